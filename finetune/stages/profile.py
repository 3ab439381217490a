"""Say where the time of a training step goes, and what would make it shorter."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from finetune import kinds
from finetune.config import compose
from finetune.config.describe import as_dict
from finetune.config.schema import Autotune, Config
from finetune.config.spelling import override
from finetune.errors import ModelError
from finetune.memory.device import peak_gib, pick_device, pick_precision, release_memory, reset_peak
from finetune.planning.candidates import Candidates
from finetune.planning.choice import Choice, choose
from finetune.planning.machine import read
from finetune.planning.plan import KEYS
from finetune.run import rundir
from finetune.run.plain import first_line
from finetune.run.progress import progress, say
from finetune.run.records import Dataset, TextSet
from finetune.run.slow_steps import OTHERS_CPU
from finetune.run.step_time import COPIES, GAPS, Profile, StepTime
from finetune.training import step_time
from finetune.training.accelerator import without_cudnn_attention
from finetune.training.loop import Step
from finetune.training.trainer import Trainer
from finetune.workstation import step_verdict
from finetune.workstation.facts import processor
from finetune.workstation.meanwhile import Meanwhile

MOST_NAMES = 6  # kernels or operations that are named
BuildTrainer = Callable[[Config, Dataset | TextSet], Trainer]


def profile(config: Config, dataset: Dataset | TextSet, build: BuildTrainer) -> Profile:
    """Steps of the real trainer, made by `build`, with each setting that is asked for; no training is left anywhere.

    config: with a folder of its own as run folder, where traces stay. Raises OutOfMemory, TrainingError as training, of
    its own setting; others that fail are named in the record.
    """
    device, asked = pick_device(config.hardware.device), config.profile
    planned = _planned(config)  # before anything is on the GPU
    effective = config.trainer.micro_batch * config.trainer.accumulate
    meanwhile = Meanwhile(device)
    times, failed = [_timed(config, dataset, build)], dict[str, str]()
    for size in asked.micro_batches:
        if size != times[0].settings["micro_batch"]:
            settings = {"micro_batch": size, "accumulate": max(1, effective // size)}
            with _noted(failed, f"{size} × {settings['accumulate']}"):
                times.append(_timed(_with(config, settings), dataset, build))
    chooses = device.type == "cuda" and config.trainer.autotune is Autotune.auto
    found = step_verdict.judge(times, planned, fast=config.trainer.fast, chooses=chooses)
    checked = None
    if asked.check and found.change:
        with _noted(failed, " ".join(found.change)):
            checked = _timed(compose.apply(config, found.change), dataset, build)
    rundir.write_config(as_dict(config), Path(config.run_dir))
    return Profile(
        name=config.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        precision=pick_precision(config.trainer.precision, device).name,
        steps=asked.steps,
        times=tuple(times),
        verdict=found.words,
        change=found.change,
        expected=found.expected,
        check=asked.check,
        checked=checked,
        unknown=() if device.type == "cuda" else (COPIES, GAPS),
        others_cpu=meanwhile.since()[OTHERS_CPU],
        failed=failed,
    )


@contextmanager
def _noted(failed: dict[str, str], setting: str) -> Iterator[None]:
    """What one setting ends in is written down; what was measured of the others stays."""
    try:
        yield
    except Exception as error:
        failed[setting] = first_line(error)


def _planned(config: Config) -> Choice | None:
    """What the plan would train with on this machine, whatever GPU the preset is of; None for a base without one."""
    release_memory()
    try:
        return choose(Candidates(kinds.of(config).workload(config), read(replace(config.hardware, gpu=""))))
    except ModelError as error:
        say(f"profile: {error}; no gain can be expected from a plan")
        return None


def _with(config: Config, settings: dict[str, int]) -> Config:
    """The same with other settings of a plan, which nothing else then chooses."""
    words = [override(KEYS[name], value) for name, value in settings.items()]
    return compose.apply(config, [*words, "trainer.autotune=off"])


def _timed(config: Config, dataset: Dataset | TextSet, build: BuildTrainer) -> StepTime:
    """Steps with one setting: warm ones, some that are timed, and some that are traced."""
    device, asked = pick_device(config.hardware.device), config.profile
    release_memory()
    with tempfile.TemporaryDirectory() as scratch, without_cudnn_attention():
        trainer = build(_short(config, scratch), dataset)
        try:
            with progress("profile", trainer.trainer.steps, unit="steps") as bar:
                steps = _counted(trainer.steps(), bar.advance)
                warm = _take(steps, asked.warm_up, device)
                reset_peak(device)
                began = time.perf_counter()
                timed = _take(steps, asked.steps, device)
                seconds, peak = (time.perf_counter() - began) / asked.steps, peak_gib(device)
                trace = Path(config.run_dir) / f"trace-{trainer.applied['micro_batch']}.json.gz"
                traced = _traced(steps, asked.steps, device, trace)
        finally:
            trainer.close()
    parts, names = step_time.per_step(traced, asked.steps, seconds)
    return StepTime(
        settings=trainer.applied,
        seconds=seconds,
        fastest_s=min(step.seconds for step in timed),
        slowest_s=max(step.seconds for step in timed),
        traced_s=traced.seconds / asked.steps,
        parts=parts,
        largest=dict(list(names.items())[:MOST_NAMES]),
        unit=trainer.task.unit,
        count=sum(step.count for step in timed) / asked.steps,
        peak_gib=peak,
        trace=str(trace),
        oom_fallbacks=", ".join(name for step in (*warm, *timed) for name in step.oom_fallbacks),
    )


def _short(config: Config, scratch: str) -> Config:
    """The same training of a few steps, without validation and previews, whose curves nobody keeps."""
    asked = config.profile
    steps = asked.warm_up + 2 * asked.steps
    trainer = replace(config.trainer, steps=steps, validate_every=0, patience=0)
    return replace(config, run_dir=scratch, trainer=trainer)


def _counted(steps: Iterator[Step], advance: Callable[[], None]) -> Iterator[Step]:
    for step in steps:
        advance()
        yield step


def _take(steps: Iterator[Step], count: int, device: torch.device) -> list[Step]:
    found = [next(steps) for _ in range(count)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found


def _traced(steps: Iterator[Step], count: int, device: torch.device, trace: Path) -> step_time.Traced:
    """Leaves the trace, of which the path must end in `.json.gz`."""
    gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *gpu]) as profiler:
        for _ in range(count):
            with record_function(step_time.STEP):
                _take(steps, 1, device)
    profiler.export_chrome_trace(str(trace))
    return step_time.read(trace)
