"""Settings that fit a GPU before anything runs: planned, tried out, and undone again.

A CPU plays the GPU here: the plan is given, and memory runs out where a test says so.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import kinds
from finetune.adapters import lora
from finetune.config.schema import Autotune, Config, Device, ExportFormat, Optimizer
from finetune.errors import Interrupted, OutOfMemory
from finetune.language import tokenize
from finetune.planning import choice, host_memory
from finetune.planning.machine import Machine
from finetune.planning.tracer import Tracer
from finetune.stages.train import train
from finetune.training.loop import Step
from finetune.training.trainer import Trainer
from tests.unit.conftest import Setting
from tests.unit.training.test_oom import Gpu, adapter, at_most, difference, into

CPU = torch.device("cpu")


def machine(gib: float) -> Machine:
    return Machine("a GPU", True, gib, 0.5, True, 100.0, 50.0, 1000.0, 20.0, True)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """A plan that takes one example at a time, each block recomputed; the calls of it are listed."""
    calls: list[dict[str, int]] = []

    def choose_settings(config: Config) -> tuple[Config, float]:
        wanted = {"micro_batch": 1, "accumulate": 4, "checkpointing": 1}
        calls.append(wanted)
        return choice.with_settings(config, **choice.settings(config) | wanted), 1.5

    monkeypatch.setattr(choice, "is_needed", lambda autotune, device: autotune is not Autotune.off)
    monkeypatch.setattr(choice, "choose_settings", choose_settings)
    return calls


def test_the_worst_step_leaves_no_trace_in_what_is_learnt(
    setting: Setting, tmp_path: Path, settled: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    config, dataset = setting.config, setting.dataset
    config.lora.dropout = 0.2
    found = train(into(config, tmp_path / "fitted", 2, 2), dataset)
    said = capfd.readouterr().err
    config.trainer.autotune, config.trainer.activation_checkpointing = Autotune.off, 1
    plain = train(into(config, tmp_path / "plain", 1, 4), dataset)
    assert difference(adapter(found), adapter(plain)) == 0
    assert (found.micro_batch, found.oom_fallbacks, len(settled)) == (1, "", 1)
    requested = "fit: micro_batch=1 accumulate=4 checkpointing=1 offload_activations=false offload=false"
    assert f"{requested}; 1.5 GiB planned; trying the worst step\n" in said
    assert f"fit: {found.dry_run_gib:.1f} GiB taken\n" in said
    assert found.planned_gib == 1.5
    assert found.dry_run_gib is not None
    assert found.measured_gib is not None
    assert found.peak_gib >= found.measured_gib >= found.dry_run_gib > 0
    assert plain.planned_gib is plain.dry_run_gib is plain.measured_gib is None
    figures = json.loads((tmp_path / "fitted" / "receipts" / "train.json").read_text())["figures"]
    assert figures["planned_gib"] == 1.5
    assert figures["probed_gib"] == pytest.approx(found.dry_run_gib)


def test_what_was_settled_holds_for_the_whole_run(
    setting: Setting, tmp_path: Path, settled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, dataset = setting.config, setting.dataset
    config.lora.dropout = 0.2
    whole = train(into(config, tmp_path / "whole", 2, 2), dataset)
    note = Trainer.note

    def interrupt(session: Trainer, step: Step) -> None:
        note(session, step)
        if step.number == 2:
            session.save()
            raise Interrupted("enough", 15)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "note", interrupt)
        with pytest.raises(Interrupted):
            train(into(config, tmp_path / "legs", 2, 2), dataset)
    assert len(settled) == 2
    legs = train(into(config, tmp_path / "legs", 2, 2), dataset)
    assert len(settled) == 2
    assert difference(adapter(whole), adapter(legs)) == 0
    assert (legs.planned_gib, legs.micro_batch) == (1.5, 1)
    config.trainer.steps = 6
    again = train(into(config, tmp_path / "legs", 4, 1), dataset)  # the person has thought about memory
    assert (len(settled), again.steps) == (3, 6)


def test_a_worst_step_that_does_not_fit_starts_smaller(
    setting: Setting, tmp_path: Path, settled: list[Any], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config, dataset = setting.config, setting.dataset
    monkeypatch.setattr(choice, "choose_settings", lambda config: (config, 2.0))
    with monkeypatch.context() as patch:
        Gpu(at_most(1)).install(patch)
        found = train(into(config, tmp_path / "small", 4, 1), dataset)
    said = capfd.readouterr().err
    assert "fit: it did not fit; starting with micro-batch 2, then micro-batch 1; same effective batch\n" in said
    assert "memory ran out" not in said
    assert (found.micro_batch, found.oom_fallbacks) == (1, "micro-batch 1 instead of 4")
    config.trainer.autotune = Autotune.off
    assert difference(adapter(found), adapter(train(into(config, tmp_path / "plain", 1, 4), dataset))) == 0


@pytest.mark.usefixtures("settled")
def test_a_card_that_is_too_small_says_so_before_the_first_step(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpu(at_most(0)).install(monkeypatch)
    with pytest.raises(OutOfMemory, match=r"^out of memory with micro-batch 1.*; try "):
        train(into(setting.config, tmp_path / "run", 2, 2), setting.dataset)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_worst_micro_batch_is_of_the_largest_example(setting: Setting) -> None:
    task = kinds.of(setting.config).build_task(setting.config, setting.dataset, CPU)
    worst = task.collate(task.worst(3))
    assert len(worst.names) == 3
    first = next(iter(task.steps(effective=8, start=0)))
    sizes = [task.collate([draw]).tensors for draw in first]
    for name, tensor in worst.tensors.items():
        assert tensor[0].numel() >= max(size[name][0].numel() for size in sizes), name


def test_the_worst_pack_is_full_and_the_worst_row_the_longest(language_config: Config) -> None:
    task = kinds.of(language_config).build_task(language_config, tokenize.build(language_config, None), CPU)
    packs = [task.collate([draw]) for draw in next(iter(task.steps(effective=32, start=0)))]
    worst = task.collate(task.worst(1))
    assert worst.items == max(pack.items for pack in packs) > min(pack.items for pack in packs)
    assert worst.padded_count == language_config.data.length
    language_config.data.packing = False
    task = kinds.of(language_config).build_task(language_config, tokenize.build(language_config, None), CPU)
    rows = [task.collate([draw]) for draw in next(iter(task.steps(effective=40, start=0)))]
    assert task.collate(task.worst(1)).padded_count == max(row.padded_count for row in rows)


def tried(config: Config, gib: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, float]:
    monkeypatch.setattr(choice, "read", lambda hardware: machine(gib))
    return choice.choose_settings(config)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_auto_takes_the_fastest_setting_of_the_same_effective_batch(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, processes: str
) -> None:
    """Of several processes each keeps its share, and so does the run."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    config = setting.config
    config.trainer.activation_checkpointing = 1
    config.sample.prompts = []
    found, planned = tried(config, 24.0, monkeypatch)
    assert choice.settings(found) == {
        "micro_batch": 4, "accumulate": 1, "checkpointing": 0, "offload_activations": False, "offload": False
    }  # fmt: skip
    assert 0 < planned < 24
    assert choice.settings(config)["micro_batch"] == 2  # the caller's stays
    config.trainer.autotune = Autotune.check
    same, less = tried(config, 24.0, monkeypatch)
    assert choice.settings(same) == choice.settings(config)
    assert 0 < less < planned


def test_main_memory_that_an_export_will_not_have_is_said_at_the_start(
    language_config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    language_config.export.formats = [ExportFormat.peft, ExportFormat.merged]
    monkeypatch.setattr(host_memory, "LEAST_GIB", 0.0)
    for free_gib, said in ((1e-6, True), (64.0, False)):
        here = replace(machine(24.0), cpu_gib=free_gib)
        monkeypatch.setattr(choice, "read", lambda hardware, here=here: here)
        choice.choose_settings(language_config)
        assert ("fit: CPU memory: export takes up to 0.0 GiB, and 0.0 are free here now; try 'export.formats=[peft]'"
                in capfd.readouterr().err) is said  # fmt: skip


def test_a_card_that_the_plan_finds_too_small_is_tried_all_the_same(
    config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config.sample.prompts = []
    found, _ = tried(config, 0.55, monkeypatch)
    assert capfd.readouterr().err.startswith("fit: the plan's least is 0.")
    assert found.trainer.micro_batch == 1


def test_a_base_that_cannot_be_planned_is_tried_all_the_same(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Such as one whose layers go by where numbers are above zero."""
    config = setting.config
    config.sample.prompts = []
    monkeypatch.setattr(choice, "is_needed", lambda autotune, device: autotune is not Autotune.off)
    monkeypatch.setattr(choice, "read", lambda hardware: machine(24.0))
    step = Tracer.step

    def choosy(self: Tracer, model: Any, inputs: Any, forward: Any, loss: Any, **rest: Any) -> Any:
        return step(self, model, inputs, lambda batch: (torch.ones(2).nonzero(), forward(batch))[1], loss, **rest)

    monkeypatch.setattr(Tracer, "step", choosy)
    found = train(into(config, tmp_path / "run", 2, 2), setting.dataset)
    said = capfd.readouterr().err
    assert "fit: this base can't be planned: it goes by its numbers, which a plan doesn't have (aten.nonzero" in said
    assert "offload=false; trying the worst step\n" in said
    assert (found.planned_gib, found.micro_batch) == (None, 2)
    assert found.dry_run_gib
    assert "planned" not in found.fit
    assert "measured" in found.fit


def test_only_a_card_is_planned_for(config: Config) -> None:
    assert not choice.is_needed(config, CPU)
    assert choice.is_needed(config, torch.device("cuda"))
    config.trainer.autotune = Autotune.off
    assert not choice.is_needed(config, torch.device("cuda"))


def test_a_preset_of_another_card_does_not_hide_this_one(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.hardware = replace(config.hardware, device=Device.auto, gpu="NVIDIA GeForce RTX 4090", vram_gib=23.5)
    seen: list[Any] = []
    config.sample.prompts, config.optim.name = [], Optimizer.adamw
    monkeypatch.setattr(choice, "read", lambda hardware: seen.append(hardware) or machine(24.0))
    choice.choose_settings(config)
    assert (seen[0].gpu, seen[0].vram_gib) == ("", 23.5)


def test_the_spare_optimiser_of_the_worst_step_is_gone_afterwards(
    setting: Setting, settled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint holds one step's worth of state."""
    sessions: list[Trainer] = []
    monkeypatch.setattr(Trainer, "finish", lambda self, _: sessions.append(self))
    setting.config.trainer.steps = 1
    with pytest.raises(AttributeError):  # there is no record to write a receipt of
        train(into(setting.config, tmp_path / "run", 2, 2), setting.dataset)
    (session,) = sessions
    states = session.optimizer.optimizer.state.values()
    assert {float(state["step"]) for state in states} == {1.0}
    assert len(states) == len(lora.adapter_parameters(session.task.model))
    assert settled
