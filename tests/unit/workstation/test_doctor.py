"""What `finetune doctor` reads, prints and returns."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pynvml
import pytest

from finetune.errors import ConfigError
from finetune.workstation import doctor, facts, nvml, versions
from finetune.workstation.checks import judge
from finetune.workstation.verdicts import Check, Verdict
from tests.conftest import Answer
from tests.unit.workstation.gpus import GEFORCE, stand_in
from tests.unit.workstation.test_checks import FAULTS, HEALTHY, changed
from tests.unit.workstation.test_load import FAULTS as OF_LOAD
from tests.unit.workstation.test_load import LOADED

Cli = Callable[..., Answer]


def test_this_machine_is_read_and_judged(finetune_cli: Cli) -> None:
    answer = finetune_cli("doctor", "--json")
    rows = json.loads(answer.out)
    assert {"driver", "ram", "outputs", "packages"} <= {row["id"] for row in rows}
    assert all(row.keys() == {"id", "verdict", "fact", "limit", "source", "cost", "cure"} for row in rows)
    verdicts = {row["verdict"] for row in rows}
    assert answer.code == (2 if "bad" in verdicts else 1 if "warn" in verdicts else 0)
    (packages,) = [row for row in rows if row["id"] == "packages"]
    assert packages["verdict"] == "ok", packages


def test_run_from_its_folder_it_knows_what_it_needs(
    finetune_cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without `pip install`, as on a machine where it is tried."""
    installed, from_name = versions.read(), metadata.Distribution.from_name

    def uninstalled(name: str) -> metadata.Distribution:
        if name == "finetune":
            raise metadata.PackageNotFoundError(name)
        return from_name(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", uninstalled)
    assert versions.read().keys() == installed.keys()
    rows = json.loads(finetune_cli("doctor", "--json").out)
    assert [row["verdict"] for row in rows if row["id"] == "packages"] == ["ok"]
    monkeypatch.setattr(versions, "HERE", tmp_path / "finetune")  # of a folder without a pyproject.toml
    assert versions.read() == {}
    assert finetune_cli("--version").out == "finetune not installed\n"


@pytest.mark.parametrize(
    ("places", "code"), [({}, 0), ({"swappiness": 60}, 1), ({"swappiness": 60, "hub__writable": False}, 2)]
)
def test_the_exit_code_is_the_worst(
    places: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(facts, "read", lambda: changed(**places))
    assert doctor.main([]) == code
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "vm.swappiness=10" in line] == [
        f"{'':8}cure: sudo sysctl vm.swappiness=10; for good:",
        f"{'':14}echo vm.swappiness=10 | sudo tee /etc/sysctl.d/90-finetune.conf",
    ][: 2 * (code > 0)]


@pytest.mark.parametrize("container", [False, True])
def test_every_line_fits_a_terminal(container: bool) -> None:
    """With every fault, in each place of files where they are usually."""
    for places in [places for _, _, places in FAULTS] + [
        {f"load__{key}": v for key, v in x.items()} for *_, x in OF_LOAD
    ]:
        lines = doctor.text(judge(changed(LOADED, container=container, **places))).splitlines()
        assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_another_word_is_refused(finetune_cli: Cli) -> None:
    answer = finetune_cli("doctor", "conf=pixar_style")
    assert answer.code == ConfigError.exit_code
    usage = "usage: finetune doctor [--load SECONDS] [--json]"
    assert answer.errors == [f"error: unrecognized arguments: conf=pixar_style; {usage}"]


def test_a_text_tells_what_is_wrong_and_the_cure() -> None:
    shown = doctor.text([Check("ram", Verdict.warn, "16 GiB", "64 GiB", "plans", "no offload", "add memory")])
    assert shown.splitlines() == [
        "warn    ram  16 GiB",
        "        limit: 64 GiB (plans)",
        "        cost: no offload",
        "        cure: add memory",
        "",
        "1 checks: 0 ok, 0 unknown, 1 warn, 0 bad",
    ]


def test_a_driver_that_answers_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, GEFORCE)
    found = nvml.read()
    (gpu,) = found["gpus"]
    assert (found["driver"], found["cuda"]) == ("580.95.05", 13000)
    assert (gpu["memory_gib"], gpu["used_gib"], gpu["throttling"]) == (24.0, 0.5, ["heat (hardware)"])
    assert gpu["remapped_rows"] == {"corrected": 0, "uncorrected": 0, "pending": 1, "failed": 0}
    assert {gpu[name] for name in ("processes", "power_limit_w", "ecc_errors", "recovery", "mig")} == {None}
    assert json.loads(json.dumps(found)) == found
    assert "throttling-0" in {check.id for check in judge(changed(nvml=found)) if check.verdict is Verdict.bad}


def test_without_a_driver_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    found = nvml.read()
    assert "version mismatch" in found["error"].lower()
    assert judge(changed(nvml=found))[0].verdict is Verdict.bad


def test_facts_are_plain_and_those_of_every_check() -> None:
    found = facts.read()
    assert json.loads(json.dumps(found)) == found
    assert found.keys() == HEALTHY.keys()
