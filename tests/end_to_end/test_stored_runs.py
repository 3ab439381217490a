"""Run folders of an earlier version: today's code takes them, with the names that settings had then, as its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from tests.end_to_end.command import contents
from tests.end_to_end.stored_losses import FURTHER, expected, figures
from tests.end_to_end.stored_runs import RUNS, STORED

pytestmark = pytest.mark.sampled
RUN = Path("run")
WEIGHTS = Path("adapter", "peft", "adapter_model.safetensors")


@pytest.fixture(params=list(RUNS))
def name(request: pytest.FixtureRequest, workdir: Path, shared_cache: Path) -> str:
    """One of the runs, in the current folder with the data that it was trained on."""
    RUNS[request.param].restore(workdir)
    (workdir / "cache").symlink_to(shared_cache)
    return str(request.param)


def test_the_command_that_made_it_finds_it_trained(name: str) -> None:
    before = _trained()
    finetune.train(RUNS[name].recipe, RUNS[name].overrides)
    assert _trained() == before
    assert _steps() == 2
    assert _exported_as_stored(name)


def test_with_more_steps_it_goes_on_from_where_it_was(name: str) -> None:
    before = figures(RUN)
    finetune.train(RUNS[name].recipe, [*RUNS[name].overrides, FURTHER])
    assert _steps() == 4
    assert (RUN / "checkpoints" / "step-000004").is_dir()
    now = figures(RUN)
    assert {tag: values[:2] for tag, values in now.items()} == before
    assert now == expected(name)


def test_it_is_exported_drawn_with_and_reported(name: str) -> None:
    run = RUNS[name]
    shutil.rmtree(RUN / "adapter")
    finetune.export(run.recipe, run.overrides)
    assert _exported_as_stored(name)
    finetune.sample(run.recipe, [*run.overrides, f'sample.prompts=["{run.prompt}"]'])
    drawn = [file.read_text(encoding="utf-8") for file in RUN.glob("samples_more/*/samples.jsonl")]
    assert len(drawn) == 1
    assert run.prompt in drawn[0]
    finetune.report(run.recipe, run.overrides)
    assert run.recipe in (RUN / "report.html").read_text(encoding="utf-8")


def test_under_another_name_it_is_the_same_run(name: str) -> None:
    run, moved = RUNS[name], Path("elsewhere/mine")
    moved.parent.mkdir()
    RUN.rename(moved)
    before = contents(moved / "checkpoints")
    finetune.train(run.recipe, [*run.overrides, f"run_dir={moved}"])
    assert contents(moved / "checkpoints") == before
    assert not RUN.exists()
    shutil.copytree(moved, RUN)
    theirs = contents(moved)
    weights = RUN / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    finetune.export(run.recipe, run.overrides)
    assert _exported_as_stored(name)
    assert contents(moved) == theirs


def _trained() -> dict[str, str]:
    """What a step would change."""
    return {"metrics": (RUN / "metrics.jsonl").read_text(encoding="utf-8"), **contents(RUN / "checkpoints")}


def _steps() -> int:
    """As the receipt has it."""
    return int(json.loads((RUN / "receipts" / "train.json").read_text(encoding="utf-8"))["record"]["steps"])


def _exported_as_stored(name: str) -> bool:
    now, before = (load_file(folder / WEIGHTS) for folder in (RUN, STORED / RUNS[name].folder))
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)
