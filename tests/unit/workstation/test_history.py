"""Whether a machine is slower than it was: what is written down, and what is made of it."""

import json
import os
import time
from pathlib import Path

import pytest

from finetune.workstation import doctor, facts, history, load
from finetune.workstation.checks import judge
from finetune.workstation.verdicts import Check, Verdict
from tests.unit.workstation.test_checks import changed
from tests.unit.workstation.test_load import LOADED

SEPTEMBER = time.mktime((2026, 9, 3, 12, 0, 0, 0, 0, -1))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for histories."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def speed(**places: object) -> Check:
    """The check of the GPU's speed against the record that lies there."""
    found = changed(LOADED | {"records": history.records()}, **places)
    return next(check for check in judge(found) if check.id == "slower-speed-0")


def test_slower_than_in_september_is_a_finding() -> None:
    assert speed().verdict is Verdict.unknown
    assert speed().fact == "151 TFLOP/s, measured for the first time"
    history.add(changed(LOADED, time=SEPTEMBER, load__gpus__0__tflops=172.0, torch__version="2.11.0+cu130"))
    history.add(changed(LOADED, time=SEPTEMBER + 86400, load__gpus__0__tflops=140.0))
    slow = speed()
    assert (slow.verdict, slow.limit) == (Verdict.warn, "at most 10% slower than ever before")
    assert slow.fact == "151 TFLOP/s, 12% slower than 172 on 2026-09-03, with torch 2.11.0+cu130"
    assert slow.source == str(history.file())
    assert speed(load__gpus__0__tflops=160.0).verdict is Verdict.ok
    best = speed(load__gpus__0__tflops=175.0)
    assert best.verdict is Verdict.ok
    assert best.fact.startswith("175 TFLOP/s, the best so far; 172 on 2026-09-03")


def test_each_part_of_the_machine_has_its_own_record() -> None:
    history.add(changed(LOADED, load__gpus__0__tflops=172.0))
    assert speed(load__gpus__0__uuid="GPU-1").verdict is Verdict.unknown
    assert speed(load__gpus__0__dtype="float16").verdict is Verdict.unknown
    assert speed(load__seconds=600.0).verdict is Verdict.unknown
    keys = [figure.key for figure in history.figures(LOADED)]
    assert len(set(keys)) == len(keys)
    other = changed(LOADED, load__cpu__threads=8, places__outputs__size_gib=100.0, load__disks__1__way="fio")
    assert len(set(keys) & {figure.key for figure in history.figures(other)}) == 2  # those of the GPU


@pytest.mark.parametrize(
    ("places", "why"),
    [
        ({"load__gpus__0__tflops": 100.0, "nvml__gpus__0__used_gib": 9.0}, "others used the GPU"),
        ({"load__gpus__0__copy_gb_per_s": 10.0, "load__busy": 0.4}, "others took 40% of the CPUs"),
        ({"load__cpu__gflops": 900.0, "load__busy": 0.4}, "others took 40% of the CPUs"),
    ],
)
def test_a_disturbed_measurement_raises_no_alarm(places: dict[str, object], why: str) -> None:
    found = changed(LOADED, **places)
    slower = [check for check in judge(found) if check.id.startswith("slower-") and check.verdict is not Verdict.ok]
    assert [check.verdict for check in slower] == [Verdict.unknown]
    assert slower[0].fact.endswith(f"; {why}")
    quiet = changed(found, load__busy=0.0, nvml__gpus__0__used_gib=0.5)
    assert [check.id for check in judge(quiet) if check.id == slower[0].id and check.verdict is Verdict.warn]


def test_what_failed_is_not_written_down() -> None:
    broken = changed(LOADED, load__gpus__0__error="CUDA error", load__disks__0={"places": ["outputs"], "error": "no"})
    assert {figure.id for figure in history.figures(broken)} == {
        "cpu", "read-models", "random-models",
    }  # fmt: skip


def test_damaged_lines_count_as_none() -> None:
    history.add(changed(LOADED, load__gpus__0__tflops=172.0))
    with open(history.file(), "a", encoding="utf-8") as log:
        log.write('{"figures": {"x": "fast"}, "time": 1}\n[1]\n\n{"time": 5}\n{"figures": {"cut o')
    assert speed().verdict is Verdict.warn
    history.file().write_bytes(b"\xff\xfe")
    assert history.records() == {}


def test_a_place_that_can_not_be_written_is_said(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (state / "finetune").write_text("a file where a folder should be")
    history.add(LOADED)
    assert capfd.readouterr().err.startswith(f"warning: cannot write {history.file()} (")


def test_only_a_load_is_written_down(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "read", lambda: changed(LOADED, load=None))
    monkeypatch.setattr(load, "read", lambda seconds, _: LOADED["load"] | {"seconds": seconds})
    doctor.doctor()
    assert list(state.iterdir()) == []
    doctor.doctor(5.0)
    (line,) = history.file().read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["figures"] == {figure.key: figure.value for figure in history.figures(LOADED)}


def test_without_a_place_for_state_it_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.fspath(history.file()) == f"{tmp_path}/.local/state/finetune/doctor.jsonl"
