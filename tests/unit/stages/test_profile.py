"""`finetune profile`, once, with all that it does, as a person types it."""

import contextlib
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from finetune import cli
from finetune.config.schema import Config
from finetune.errors import ConfigError, TrainingError
from finetune.reporting import terminal
from finetune.reporting.notebook import html
from finetune.run.plain import from_plain
from finetune.run.step_time import Profile, StepTime
from finetune.stages import profile
from finetune.workstation import step_verdict
from tests.unit.conftest import talking_config

FOUR = ("trainer.micro_batch=4", "trainer.accumulate=1")


@dataclass(frozen=True)
class Told:
    """What the command printed, in which folder, and how it ended."""

    folder: Path
    printed: dict[str, Any]
    code: int
    errors: list[str]

    @property
    def record(self) -> Profile:
        return from_plain(Profile, self.printed)


JUDGE = step_verdict.judge


def advise_four(*arguments: Any, **settings: Any) -> step_verdict.Verdict:
    """What is fastest on a busy machine is left to chance."""
    return replace(JUDGE(*arguments, **settings), change=FOUR, expected=0.5)


TIMED = profile._timed


def timed_but_sixteen(config: Config, *others: Any) -> StepTime:
    """One of the settings fails, as a kernel of a GPU may."""
    if config.trainer.micro_batch == 16:
        raise RuntimeError("input dtypes must be the same\nsomewhere")
    return TIMED(config, *others)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, tiny_language: Path) -> Told:
    folder = tmp_path_factory.mktemp("profile")
    config = talking_config(folder, tiny_language)
    trained = folder / "run" / "receipts" / "train.json"
    trained.parent.mkdir(parents=True)
    trained.write_text("a training's")
    words = ["profile", "conf=pirate_chat", f"model.base={tiny_language}", f"data.file={config.data.file}", "--json"]
    words += ["data.length=192", "data.workers=1", f"data.cache={config.data.cache}", f"run_dir={folder / 'run'}"]
    words += ["profile.steps=1", "profile.warm_up=1", "trainer.micro_batch=1", "trainer.accumulate=4"]
    out, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        patch.setenv("HYDRA_FULL_ERROR", "1")
        patch.setattr(cli.logging, "basicConfig", lambda **_: None)
        patch.setattr(step_verdict, "judge", advise_four)
        patch.setattr(profile, "_timed", timed_but_sixteen)
        code = cli.main([*words, "profile.micro_batches=[16,8]", "--check"])
    return Told(folder / "run", json.loads(out.getvalue()), code, errors.getvalue().splitlines())


def test_a_step_is_divided_by_micro_batch(told: Told) -> None:
    own, eight = told.record.times
    assert [each.name for each in told.record.times] == ["1 × 4", "8 × 1"]
    for each in (own, eight):
        assert sum(each.parts.values()) == pytest.approx(each.seconds)
        assert each.parts["matmul"] > 0
        assert each.parts["waiting for data"] > 0
        assert each.parts["optimiser"] > 0
        assert each.count > 0
        assert 0 < each.fastest_s <= each.slowest_s
        assert each.unit == "tokens"
    assert own.parts.keys() == eight.parts.keys()
    assert told.record.unknown == ("host-device copies", "launch gaps")
    assert told.record.threads > 0


def test_a_setting_that_fails_is_one_line_and_the_others_stay(told: Told, show: Any) -> None:
    why = "input dtypes must be the same somewhere"
    assert told.record.failed == {"16 × 1": why}
    assert told.code == TrainingError.exit_code
    assert [line for line in told.errors if line.startswith("error: ")] == [f"error: 16 × 1 failed: {why}"]
    assert "measured gain: the change failed" in "\n".join(show(replace(told.record, checked=None)))


def test_traces_stay_and_no_training_does(told: Told) -> None:
    assert {path.name for path in told.folder.iterdir()} == {"receipts", "profile"}
    assert (told.folder / "receipts" / "train.json").read_text() == "a training's"
    there = {path.name for path in (told.folder / "profile").iterdir()} - {".lock"}
    assert there == {"config.yaml", "receipts", "trace-1.json.gz", "trace-4.json.gz", "trace-8.json.gz"}
    assert {path.name for path in (told.folder / "profile" / "receipts").iterdir()} == {"dataset.json"}
    trace = json.loads(gzip.decompress(Path(told.record.times[0].trace).read_bytes()))
    assert any(event.get("name") == "waiting for data" for event in trace["traceEvents"])


def test_the_change_that_is_named_is_checked(told: Told) -> None:
    record = told.record
    assert record.checked is not None
    assert record.checked.name == "4 × 1"
    assert told.printed["gain"] == record.gain == record.checked.items_per_s / record.times[0].items_per_s - 1


@pytest.fixture
def show(told: Told, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    def shown(record: Profile, *overrides: str) -> list[str]:
        terminal.show(Config(run_dir="outputs/a"), record, overrides, began=0.0)
        return capsys.readouterr().out.splitlines()

    return shown


def test_a_person_sees_tables_the_verdict_and_what_to_type(told: Told, show: Any) -> None:
    record = told.record
    lines = show(record, "conf=pirate_chat", "lora.rank=4", "profile.steps=2")
    assert max(map(len, lines[: lines.index("next")])) <= 80
    text = "\n".join(lines)
    for part in record.times[0].parts:
        assert f"\n{part} " in text
    assert "expected gain: 50% more tokens/s" in text
    assert "cannot tell without a GPU: host-device copies, launch gaps" in text
    assert "\nby micro-batch × accumulation" in text
    assert f"measured gain: {record.gain:+.0%} tokens/s" in text
    assert any(line.endswith(f"train conf=pirate_chat lora.rank=4 {' '.join(record.change)}") for line in lines)
    assert record.verdict.split(" ", 1)[0] in html(record)
    assert (" of the CPUs meanwhile: " in text) == (record.others_cpu > 0.25)
    unchanged = replace(record, times=record.times[:1], checked=None, change=(), expected=None, others_cpu=0.7)
    alone = "\n".join(show(unchanged))
    assert "by micro-batch" not in alone
    assert "measured gain: there is no change to measure" in alone
    assert "other programs took 70% of the CPUs meanwhile" in alone
    assert " train " not in alone
    assert "gain" not in "\n".join(show(replace(unchanged, check=False)))


def test_python_hot_spots_are_a_command_where_the_sampler_is_installed(
    told: Told, show: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert show(told.record, "conf=a")[-1].strip().startswith("pip install py-spy")
    (tmp_path / "py-spy").write_text("#!/bin/sh\n")
    (tmp_path / "py-spy").chmod(0o755)
    last = show(told.record, "conf=a", "profile.check=true")[-1].split()
    assert last[:4] == ["py-spy", "record", "-o", "outputs/a/profile/python.svg"]
    assert last[-2:] == ["profile", "conf=a"]


def test_what_this_machine_can_not_do_leaves_nothing(finetune_cli: Callable[..., Any], example_data: Path) -> None:
    answer = finetune_cli("profile", "conf=pixar_style", "optim=adamw8bit", "hardware.device=cpu")
    assert answer.code == ConfigError.exit_code
    assert "optim.name=adamw8bit needs a CUDA GPU" in answer.errors[-1]
    assert [path.name for path in example_data.iterdir()] == ["datasets"]


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ("[3]", "below the effective batch of 8 must divide it, got 3; try 'profile.micro_batches=[1,2,4,8]'"),
        ("[2,2]", "must be numbers in 1 … 10,000, each once, got [2, 2]; try 'profile.micro_batches=[1,2,4]'"),
    ],
)
def test_micro_batches_that_can_not_be_are_refused(
    finetune_cli: Callable[..., Any], workdir: Path, sizes: str, why: str
) -> None:
    answer = finetune_cli("profile", "conf=pixar_style", f"profile.micro_batches={sizes}")
    assert answer.code == ConfigError.exit_code
    assert answer.errors == [f"error: profile.micro_batches {why}"]
