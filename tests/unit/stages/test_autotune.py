"""Settings that fit the GPU before the first step: planned, tried in a dry run, which leaves no trace.

Without a GPU: the plan is given, and memory runs out where a test says so.
"""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import kinds
from finetune.adapters import lora
from finetune.config.schema import Autotune, Config, Device, ExportFormat, HardwareConfig, Optimizer
from finetune.errors import Interrupted, OutOfMemory
from finetune.language import tokenize
from finetune.planning import choice, host_memory
from finetune.planning.candidates import Candidates
from finetune.planning.machine import Machine
from finetune.planning.tracer import Tracer
from finetune.planning.workload import Workload
from finetune.stages.train import train
from finetune.training import measured
from finetune.training.task import Batch, Task
from finetune.training.trainer import Trainer
from tests import cutting
from tests.unit.conftest import Setting, change_tasks
from tests.unit.training.small_gpu import OOM_MESSAGE, Gpu, adapter, at_most, difference, into

pytestmark = pytest.mark.sampled
CPU = torch.device("cpu")


def machine(gib: float) -> Machine:
    return Machine("a GPU", True, gib, 0.5, True, 100.0, 50.0, 1000.0, 20.0, True)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Workload]:
    """A plan that takes one example at a time with activation checkpointing; what it was made for is listed."""
    made: list[Workload] = []

    def choose_settings(workload: Workload, hardware: HardwareConfig) -> tuple[dict[str, Any], float, tuple[int, ...]]:
        made.append(workload)
        requested = choice.settings(workload.trainer, workload.model)
        return requested | {"micro_batch": 1, "accumulate": 4, "checkpointing": 1}, 1.5, (1, 2, 4)

    monkeypatch.setattr(choice, "is_needed", lambda autotune, device: autotune is not Autotune.off)
    monkeypatch.setattr(choice, "choose_settings", choose_settings)
    return made


def autotune_lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What `trainer.autotune` has printed so far."""
    lines = capfd.readouterr().err.splitlines()
    return [line.removeprefix("autotune: ") for line in lines if line.startswith("autotune: ")]


def test_the_dry_run_leaves_no_trace_in_the_adapter(
    setting: Setting, tmp_path: Path, plans: list[Workload], capfd: pytest.CaptureFixture[str]
) -> None:
    config, dataset = setting.config, setting.dataset
    config.lora.dropout = 0.2
    found = train(into(config, tmp_path / "fitted", 2, 2), dataset)
    chosen, taken = autotune_lines(capfd)
    config.trainer.autotune, config.trainer.activation_checkpointing = Autotune.off, 1
    plain = train(into(config, tmp_path / "plain", 1, 4), dataset)
    assert difference(adapter(found), adapter(plain)) == 0
    assert (found.micro_batch, found.oom_fallbacks, len(plans)) == (1, "", 1)
    assert chosen.startswith(
        "micro_batch=1 accumulate=4 checkpointing=1 offload_activations=false offload=false; 1.5 GiB"
    )
    assert taken.startswith(f"{found.dry_run_gib:.1f} GiB")
    assert found.planned_gib == 1.5
    assert found.dry_run_gib is not None
    assert found.measured_gib is not None
    assert found.peak_gib >= found.measured_gib >= found.dry_run_gib > 0
    assert plain.planned_gib is plain.dry_run_gib is plain.measured_gib is None
    figures = json.loads((tmp_path / "fitted" / "receipts" / "train.json").read_text())["figures"]
    assert figures["planned_gib"] == 1.5
    assert figures["dry_run_gib"] == pytest.approx(found.dry_run_gib)


def test_the_chosen_settings_hold_for_the_whole_run(setting: Setting, tmp_path: Path, plans: list[Workload]) -> None:
    config, dataset = setting.config, setting.dataset
    config.lora.dropout = 0.2
    whole = train(into(config, tmp_path / "whole", 2, 2), dataset)
    with cutting.cut(2), pytest.raises(Interrupted):
        train(into(config, tmp_path / "legs", 2, 2), dataset)
    assert len(plans) == 2
    legs = train(into(config, tmp_path / "legs", 2, 2), dataset)
    assert len(plans) == 2
    assert difference(adapter(whole), adapter(legs)) == 0
    assert (legs.planned_gib, legs.micro_batch) == (1.5, 1)
    config.trainer.steps = 6
    again = train(into(config, tmp_path / "legs", 4, 1), dataset)  # other memory settings are planned for again
    assert (len(plans), again.steps) == (3, 6)


@pytest.mark.parametrize("change", ["gpu", "limit"])
def test_a_run_that_goes_on_with_less_gpu_memory_is_planned_and_tried_again(
    setting: Setting, tmp_path: Path, plans: list[Workload], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    config = into(setting.config, tmp_path / "run", 2, 2)
    monkeypatch.setattr("finetune.stages.train.gpu_gib", lambda _: 24.0)
    with cutting.cut(2), pytest.raises(Interrupted):
        train(config, setting.dataset)
    if change == "gpu":
        monkeypatch.setattr("finetune.stages.train.gpu_gib", lambda _: 12.0)
    else:
        config.hardware.vram_gib = 10.0
    dry_runs: list[bool] = []
    monkeypatch.setattr(Trainer, "_dry_run", lambda trainer: dry_runs.append(trainer.resumed is not None))
    train(config, setting.dataset)
    assert (len(plans), dry_runs) == (2, [True])


@pytest.mark.usefixtures("plans")
def test_training_starts_with_the_fallbacks_of_the_dry_run(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, dataset = setting.config, setting.dataset
    monkeypatch.setattr(
        choice, "choose_settings", lambda workload, _: (choice.settings(workload.trainer, workload.model), 2.0, (4, 2))
    )
    with monkeypatch.context() as patch:
        Gpu(at_most(1)).install(patch)
        found = train(into(config, tmp_path / "small", 4, 1), dataset)
    said = capfd.readouterr().err.splitlines()
    (line,) = [line for line in said if "memory ran out" in line]  # and in no step of the run
    assert line.startswith("autotune: ")
    assert "micro-batch 2, then micro-batch 1;" in line
    assert (found.micro_batch, found.oom_fallbacks) == (1, "micro-batch 1 instead of 4")
    config.trainer.autotune = Autotune.off
    assert difference(adapter(found), adapter(train(into(config, tmp_path / "plain", 1, 4), dataset))) == 0


@pytest.mark.usefixtures("plans")
def test_a_gpu_that_is_too_small_is_an_error_before_the_first_step(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpu(at_most(0)).install(monkeypatch)
    with pytest.raises(OutOfMemory, match=r"with micro-batch 1.*; try "):
        train(into(setting.config, tmp_path / "run", 2, 2), setting.dataset)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture
def slow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of one example take a while, and those of four do not fit; any run is long enough to measure."""

    def change(task: Task) -> None:
        loss = task.loss

        def changed(batch: Batch) -> torch.Tensor:
            if torch.is_grad_enabled() and len(batch.names) == 4:
                raise torch.OutOfMemoryError(OOM_MESSAGE)
            time.sleep(0.05 if len(batch.names) == 1 else 0.0)
            return loss(batch)

        monkeypatch.setattr(task, "loss", changed)

    change_tasks(monkeypatch, change)
    monkeypatch.setattr(measured, "REPAID", 0)


@pytest.mark.usefixtures("plans", "slow_ones")
def test_micro_batches_that_the_plan_cannot_tell_apart_are_measured(
    setting: Setting, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, dataset = setting.config, setting.dataset
    config.lora.dropout = 0.2
    config.trainer.validate_every = config.sample.previews = 0
    with cutting.cut(2), pytest.raises(Interrupted):
        train(into(config, tmp_path / "measured", 4, 1), dataset)
    lines = [line for line in autotune_lines(capfd) if "measured" in line]
    assert [re.sub(r"\d+ ms", "… ms", line) for line in lines] == [
        "a step by micro-batch, measured: 1: … ms, 2: … ms; training with micro_batch=2"
    ]
    found = train(config, dataset)
    assert not any("measured" in line for line in autotune_lines(capfd)), "what goes on keeps its choice"
    assert (found.micro_batch, found.effective, found.oom_fallbacks) == (2, 4, "")
    config.trainer.autotune, config.trainer.activation_checkpointing = Autotune.off, 1
    plain = train(into(config, tmp_path / "plain", 2, 2), dataset)
    assert difference(adapter(found), adapter(plain)) == 0


def test_a_measurement_must_be_repaid_and_its_gain_be_clear() -> None:
    assert [measured.repays(count, 720) for count in (1, 2, 3, 4)] == [False, True, True, False]
    assert measured.fastest({8: 1.0, 4: 0.98, 2: 2.0}, planned=8) == 8
    assert measured.fastest({8: 1.0, 4: 0.9, 2: 2.0}, planned=8) == 4
    assert measured.fastest({4: 0.9, 2: 2.0}, planned=8) == 4


def test_only_micro_batches_whose_seconds_are_close_are_measured(config: Config) -> None:
    candidates = Candidates(kinds.of(config).workload(config), machine(24.0))
    one, two, four = (candidates.setting(size, 0) for size in (1, 2, 4))
    settings = [replace(one, seconds=1.3), replace(two, seconds=1.0), replace(four, seconds=1.2)]
    away = replace(one, seconds=1.0, checkpointing=1)
    assert choice.Choice(candidates, (*settings, away), settings[1]).comparable == (2, 4)
    large = replace(settings[2], parts={"activations": 30.0})
    assert choice.Choice(candidates, (*settings[:2], large), settings[1]).comparable == (2,)
    assert choice.Choice(candidates, tuple(settings), None).comparable == ()


def test_the_largest_micro_batch_is_of_the_largest_example(setting: Setting) -> None:
    task = kinds.of(setting.config).build_task(setting.config, setting.dataset, CPU)
    worst = task.collate(task.worst(3))
    assert len(worst.names) == 3
    first = next(iter(task.steps(effective=8, start=0)))
    sizes = [task.collate([draw]).tensors for draw in first]
    for name, tensor in worst.tensors.items():
        assert tensor[0].numel() >= max(size[name][0].numel() for size in sizes), name


def test_the_largest_pack_is_full_and_the_largest_row_the_longest(language_config: Config) -> None:
    task = kinds.of(language_config).build_task(language_config, tokenize.build(language_config, None), CPU)
    packs = [task.collate([draw]) for draw in next(iter(task.steps(effective=32, start=0)))]
    worst = task.collate(task.worst(1))
    assert worst.items == max(pack.items for pack in packs) > min(pack.items for pack in packs)
    assert worst.padded_count == language_config.data.length
    language_config.data.packing = False
    task = kinds.of(language_config).build_task(language_config, tokenize.build(language_config, None), CPU)
    rows = [task.collate([draw]) for draw in next(iter(task.steps(effective=40, start=0)))]
    assert task.collate(task.worst(1)).padded_count == max(row.padded_count for row in rows)


def requested(config: Config) -> dict[str, Any]:
    return choice.settings(config.trainer, config.model)


def chosen(config: Config) -> tuple[dict[str, Any], float | None]:
    """Settings and planned GiB."""
    return choice.choose_settings(kinds.of(config).workload(config), config.hardware)[:2]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_auto_takes_the_fastest_setting_of_the_same_effective_batch(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, processes: str
) -> None:
    """Of several processes each keeps its share."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(choice, "read", lambda hardware: machine(24.0))
    config = setting.config
    config.trainer.activation_checkpointing = 1
    config.sample.prompts = []
    found, planned = chosen(config)
    assert found == {
        "micro_batch": 4, "accumulate": 1, "checkpointing": 0, "offload_activations": False, "offload": False
    }  # fmt: skip
    assert planned is not None
    assert 0 < planned < 24
    config.trainer.autotune = Autotune.check
    same, less = chosen(config)
    assert same == requested(config)
    assert less is not None
    assert 0 < less < planned


def test_cpu_memory_that_the_export_will_lack_is_reported_at_the_start(
    language_config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    language_config.export.formats = [ExportFormat.peft, ExportFormat.merged]
    monkeypatch.setattr(host_memory, "LEAST_GIB", 0.0)
    for free_gib, warned in ((1e-6, True), (64.0, False)):
        here = replace(machine(24.0), cpu_gib=free_gib)
        monkeypatch.setattr(choice, "read", lambda hardware, here=here: here)
        chosen(language_config)
        said = [
            line for line in autotune_lines(capfd) if "CPU memory: export" in line and "export.formats=[peft]" in line
        ]
        assert bool(said) is warned


def test_a_gpu_that_the_plan_finds_too_small_is_tried_all_the_same(
    config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config.sample.prompts = []
    monkeypatch.setattr(choice, "read", lambda hardware: machine(0.55))
    found, _ = chosen(config)
    assert "the plan's least is 0." in autotune_lines(capfd)[-1]
    assert found["micro_batch"] == 1


def test_a_base_that_cannot_be_planned_is_tried_all_the_same(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Such as one whose layers depend on values: a plan has shapes alone."""
    config = setting.config
    config.sample.prompts = []
    monkeypatch.setattr(choice, "is_needed", lambda autotune, device: autotune is not Autotune.off)
    monkeypatch.setattr(choice, "read", lambda hardware: machine(24.0))
    step = Tracer.step

    def by_value(self: Tracer, model: Any, inputs: Any, forward: Any, loss: Any, **rest: Any) -> Any:
        return step(self, model, inputs, lambda batch: (torch.ones(2).nonzero(), forward(batch))[1], loss, **rest)

    monkeypatch.setattr(Tracer, "step", by_value)
    found = train(into(config, tmp_path / "run", 2, 2), setting.dataset)
    error, settings, taken = autotune_lines(capfd)
    assert "can't be planned" in error
    assert "aten.nonzero" in error
    assert "planned" not in settings
    assert "GiB" in taken
    assert (found.planned_gib, found.micro_batch) == (None, 2)
    assert found.dry_run_gib
    assert found.measured_gib


def test_settings_are_chosen_for_gpus_alone() -> None:
    for autotune, needed in ((Autotune.auto, True), (Autotune.check, True), (Autotune.off, False)):
        assert not choice.is_needed(autotune, CPU)
        assert choice.is_needed(autotune, torch.device("cuda")) is needed


def test_the_preset_of_another_gpu_does_not_replace_this_one(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.hardware = replace(config.hardware, device=Device.auto, gpu="NVIDIA GeForce RTX 4090", vram_gib=23.5)
    seen: list[Any] = []
    config.sample.prompts, config.optim.name = [], Optimizer.adamw
    monkeypatch.setattr(choice, "read", lambda hardware: seen.append(hardware) or machine(24.0))
    chosen(config)
    assert (seen[0].gpu, seen[0].vram_gib) == ("", 23.5)


@pytest.mark.usefixtures("plans")
def test_the_optimiser_of_the_dry_run_is_not_that_of_the_training(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint holds the state of one step."""
    trainers: list[Trainer] = []
    monkeypatch.setattr(Trainer, "finish", lambda self, _: trainers.append(self))
    setting.config.trainer.steps = 1
    with pytest.raises(AttributeError):  # there is no record to write a receipt of
        train(into(setting.config, tmp_path / "run", 2, 2), setting.dataset)
    (trainer,) = trainers
    states = trainer.optimizer.optimizer.state.values()
    assert {float(state["step"]) for state in states} == {1.0}
    assert len(states) == len(lora.adapter_parameters(trainer.task.model))
