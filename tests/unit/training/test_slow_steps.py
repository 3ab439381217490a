"""A step that takes many times the usual is noted once for each cause, in the run's curves, report and page."""

import itertools
import json
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.config.describe import as_dict
from finetune.config.schema import Config
from finetune.run import rundir, slow_steps
from finetune.run.records import METRICS, Dataset
from finetune.serving.runs import Runs
from finetune.stages.report import report
from finetune.stages.train import train
from finetune.training import energy, loop
from finetune.training.loop import Step
from finetune.training.slow_steps import LEAST, SlowSteps
from finetune.workstation import linux, meanwhile
from finetune.workstation.meanwhile import Meanwhile
from tests.unit.workstation.gpus import GEFORCE, stand_in

SLOW = slow_steps.SECONDS, slow_steps.USUAL_S


class Machine:
    """Tells what is planted."""

    def __init__(self) -> None:
        self.told: Mapping[str, float] = {}
        self.asked = 0

    def start(self) -> None: ...

    def since(self) -> Mapping[str, float]:
        self.asked += 1
        return self.told


def step(seconds: float, *, tokens: int = 100, fallbacks: tuple[str, ...] = ()) -> Step:
    return Step(1, 1.0, 1.0, 0.1, tokens, tokens, seconds, oom_fallbacks=fallbacks)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def steady(machine: Machine) -> SlowSteps:
    """After steps of a second."""
    found = SlowSteps(machine)
    assert not any(found.see(step(1.0)) for _ in range(LEAST))
    return found


def test_the_machine_is_asked_at_a_slow_step_alone(steady: SlowSteps, machine: Machine) -> None:
    assert steady.see(step(3.9)) == {}, "less than four times the usual"
    assert steady.see(step(9.0, tokens=900)) == {}, "as slow as its length explains"
    assert steady.see(step(9.0, fallbacks=("micro-batch 1",))) == {}, "it was taken twice"
    assert machine.asked == 0
    assert steady.see(step(9.0)) == dict(zip(SLOW, (9.0, 1.0), strict=True))
    assert machine.asked == 1


def test_the_first_steps_and_short_ones_are_never_slow(machine: Machine) -> None:
    steps = SlowSteps(machine)
    assert steps.see(step(60.0)) == {}
    assert not any(steps.see(step(0.02)) for _ in range(LEAST))
    assert steps.see(step(1.9)) == {}
    assert machine.asked == 0


def test_each_cause_is_noted_once(steady: SlowSteps, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.told = {slow_steps.SWAPPED_MIB: 2000.0, slow_steps.OTHERS_CPU: 0.1, slow_steps.THROTTLED: 0.0}
    found = steady.see(step(9.0))
    assert found.items() >= machine.told.items()
    assert steady.see(step(9.0)) == {}
    machine.told = dict(machine.told) | {slow_steps.THROTTLED: 1.0, slow_steps.GPU_PROGRAMS: 2.0}
    assert steady.see(step(9.0))
    machine.told = {}
    assert steady.see(step(9.0))
    assert steady.see(step(9.0)) == {}
    heat = "heat, a power brake or the hardware slowed the GPU down"
    assert capsys.readouterr().err.splitlines() == [
        f"step 1 took 9 s, 9 times the usual 1 s; {words}"
        for words in (
            "2,000 MiB moved between memory and swap",
            f"{heat}; 2,000 MiB moved between memory and swap; 2 other programs computed on the GPU",
            "what is known of the machine does not explain it",
        )
    ]


def test_what_happened_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 5\npswpin 10\npswpout 20\n")
    monkeypatch.setattr(linux, "PROC", tmp_path)
    monkeypatch.setattr(meanwhile, "taken_by_others_s", itertools.count(100.0, 6.0).__next__)
    monkeypatch.setattr(meanwhile, "time", SimpleNamespace(monotonic=itertools.count(0.0, 4.0).__next__))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(mmap, "PAGESIZE", 2**20)
    looked = Meanwhile(torch.device("cpu"))
    (tmp_path / "vmstat").write_text("pswpin 110\npswpout 30\n")
    assert looked.since() == {slow_steps.OTHERS_CPU: 0.75, slow_steps.SWAPPED_MIB: 110.0}
    assert looked.since()[slow_steps.SWAPPED_MIB] == 0
    (tmp_path / "vmstat").unlink()
    assert slow_steps.SWAPPED_MIB not in looked.since()


@pytest.mark.parametrize(
    ("pids", "found"),
    [((7, 8, 9), {slow_steps.GPU_PROGRAMS: 2.0}), ((7,), {slow_steps.GPU_PROGRAMS: 0.0}), ((8, 9), {}), (None, {})],
)
def test_what_the_gpu_of_the_run_says(
    pids: tuple[int, ...] | None, found: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose processes these are is known where our own is among them."""
    running = [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in pids or ()]
    told = {} if pids is None else {"nvmlDeviceGetComputeRunningProcesses": running}
    stand_in(monkeypatch, GEFORCE | told)
    monkeypatch.setattr(energy, "handles", lambda _: [0])
    monkeypatch.setattr(os, "getpid", lambda: 7)
    seen = Meanwhile(torch.device("cuda")).since()
    assert {tag: seen[tag] for tag in seen if "gpu" in tag} == {slow_steps.THROTTLED: 1.0} | found


def test_a_run_with_a_slow_step_shows_it(
    config: Config, make_dataset: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lengths = [1.0] * 11 + [30.0] + [1.0]
    ticks = itertools.accumulate(itertools.chain.from_iterable((0.0, length) for length in lengths))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=ticks.__next__))
    monkeypatch.setattr(Meanwhile, "since", lambda _: {slow_steps.OTHERS_CPU: 0.5})
    config.trainer.steps, config.trainer.save_every, config.trainer.validate_every = len(lengths), 100, 0
    config.sample.prompts = []
    train(config, make_dataset())
    said = "step 12 took 30 s, 30 times the usual 1 s; other programs took 50% of the CPUs"
    assert said in capsys.readouterr().err
    run = Path(config.run_dir)
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows if slow_steps.SECONDS in row] == [12]
    rundir.write_config(as_dict(config), run)
    (summary,) = Runs(run.parent).all()
    assert summary["slow"] == [said]
    page = Path(report(config).file).read_text(encoding="utf-8")
    assert f"<li>{said}</li>" in page
