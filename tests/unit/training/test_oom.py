"""OOM fallbacks: the same steps in smaller micro-batches, nothing lost, nothing counted twice."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune import kinds
from finetune.adapters import lora
from finetune.errors import OutOfMemory, is_out_of_memory
from finetune.memory import activation_offload
from finetune.memory.fallbacks import try_within_memory
from finetune.stages.train import train
from finetune.training import checkpoint
from finetune.training.oom import OomFallbacks
from finetune.training.task import Task
from tests.unit.conftest import Setting, change_tasks
from tests.unit.training.small_gpu import OOM_MESSAGE, Gpu, adapter, at_most, difference, into

pytestmark = pytest.mark.sampled


def oom_lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The messages so far that memory ran out."""
    return [line for line in capfd.readouterr().err.splitlines() if "memory ran out" in line]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("limit", [1, 2])
def test_a_run_that_runs_out_equals_one_with_smaller_micro_batches(
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    where: str,
    limit: int,
) -> None:
    """From the first step on: with dropout, bit for bit."""
    config, dataset = setting.config, setting.dataset
    config.lora.dropout = 0.2
    small = train(into(config, tmp_path / "small", limit, 4 // limit), dataset)
    gpu = Gpu(at_most(limit), where).install(monkeypatch)
    capfd.readouterr()
    run = train(into(config, tmp_path / "full", 4, 1), dataset)
    (line,) = oom_lines(capfd)
    assert line.startswith("step 1:")
    assert {1: "micro-batch 2, then micro-batch 1;", 2: "micro-batch 2;"}[limit] in line
    assert line.endswith("effective batch still 4")
    assert difference(adapter(run), adapter(small)) == 0
    assert (run.steps, run.items, run.skipped_steps) == (small.steps, small.items, 0)
    assert run.last_loss == pytest.approx(small.last_loss, rel=1e-6)
    assert (run.micro_batch, run.oom_fallbacks) == (limit, f"micro-batch {limit} instead of 4")
    assert (small.micro_batch, small.oom_fallbacks) == (limit, "")
    assert gpu.losses


def test_gradients_of_the_failed_attempt_are_dropped(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, dataset = setting.config, setting.dataset
    small = train(into(config, tmp_path / "small", 1, 4), dataset)
    # The first micro-batch fits and leaves gradients, the second doesn't.
    gpu = Gpu(lambda examples, step, _: examples == 1 or gpu.losses == 1).install(monkeypatch)
    run = train(into(config, tmp_path / "full", 2, 2), dataset)
    assert difference(adapter(run), adapter(small)) == 0


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_in_the_middle_changes_nothing_but_rounding(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config, dataset = setting.config, setting.dataset
    config.optim.eps = 1e-3  # with 1e-8 Adam turns rounding of vanishing gradients into full steps
    small = train(into(config, tmp_path / "small", 1, 4), dataset)
    Gpu(lambda examples, step, _: examples == 1 or step < 2, where).install(monkeypatch)
    run = train(into(config, tmp_path / "full", 4, 1), dataset)
    assert difference(adapter(run), adapter(small)) <= 1e-6
    assert max(float(weight.abs().max()) for weight in adapter(small).values()) > 1e-2
    lines = (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()
    assert [line.count('"loss/step"') for line in lines].count(1) == 4
    assert (run.items, run.micro_batch) == (small.items, 1)


def test_a_resumed_run_keeps_its_fallbacks(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stopped after fallbacks down to activation checkpointing, and resumed: the same adapter, bit for bit."""
    config, dataset = setting.config, setting.dataset
    config.lora.dropout = 0.2
    Gpu(lambda examples, step, checkpointed: (examples == 1 and checkpointed) or step < 1).install(monkeypatch)
    config.trainer.steps = 6
    whole = train(into(config, tmp_path / "whole", 4, 1), dataset)
    config.trainer.steps = 2
    train(into(config, tmp_path / "legs", 4, 1), dataset)
    state = checkpoint.load(tmp_path / "legs" / "checkpoints" / "step-000002").state
    assert (state.micro_batch, state.fallbacks) == (1, 1)
    config.trainer.steps = 6
    capfd.readouterr()
    legs = train(config, dataset)
    assert not oom_lines(capfd)
    assert difference(adapter(whole), adapter(legs)) == 0
    assert legs.items == whole.items
    assert legs.oom_fallbacks == whole.oom_fallbacks == "micro-batch 1 instead of 4, trainer.activation_checkpointing=1"


def test_other_memory_settings_replace_the_fallbacks_of_an_earlier_run(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, dataset = setting.config, setting.dataset
    with monkeypatch.context() as patch:
        Gpu(at_most(1)).install(patch)
        config.trainer.steps = 2
        train(into(config, tmp_path / "run", 4, 1), dataset)
    config.trainer.steps = 4
    again = train(into(config, tmp_path / "run", 2, 2), dataset)
    assert (again.micro_batch, again.oom_fallbacks) == (2, "")


def test_when_no_fallback_is_left_it_says_what_was_tried_and_what_may_fit(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, dataset = setting.config, setting.dataset
    Gpu(lambda examples, step, checkpointed: step < 2).install(monkeypatch)
    smaller = {"diffusion": r"model\.resolution=16, or", "language": r"data\.length=96, model\.quantize=nf4, or"}
    tried = r"micro-batch 1 instead of 4, trainer\.activation_checkpointing=1; "
    with pytest.raises(OutOfMemory, match=rf"{tried}.*{smaller[config.model.kind]}"):
        train(into(config, tmp_path / "run", 4, 1), dataset)
    assert checkpoint.steps_on_disk(tmp_path / "run" / "checkpoints") == [2]  # and nothing that was done is lost


def test_activation_checkpointing_that_is_on_already_is_no_fallback(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpu(lambda *_: False).install(monkeypatch)
    setting.config.trainer.activation_checkpointing = 1
    with pytest.raises(OutOfMemory, match=r"with micro-batch 1; try"):
        train(into(setting.config, tmp_path / "run", 1, 4), setting.dataset)


def limited_to(monkeypatch: pytest.MonkeyPatch, name: str, fits: Callable[[Any], bool]) -> None:
    """A task whose `name` runs out of memory, in eval mode as it would, unless its first argument `fits`."""

    def limit(task: Task) -> None:
        whole = getattr(task, name)

        def limited(first: Any, *rest: Any) -> Any:
            if fits(first):
                return whole(first, *rest)
            task.model.eval()
            raise torch.OutOfMemoryError(OOM_MESSAGE)

        setattr(task, name, limited)

    change_tasks(monkeypatch, limit)


def test_validation_takes_smaller_batches_and_training_does_not(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, dataset = setting.config, setting.dataset
    config.lora.dropout = 0.2  # off in eval mode: a model left there would train another adapter
    config.sample.prompts = ["a red robot", "a cat", "a boat"]
    plain = train(into(config, tmp_path / "plain", 4, 1), dataset)
    with monkeypatch.context() as patch:
        limited_to(patch, "validate", lambda size: size <= 1)
        capfd.readouterr()
        run = train(into(config, tmp_path / "full", 4, 1), dataset)
    lines = oom_lines(capfd)  # of the first validation alone: the later ones start with its size
    assert [(line[:7], "validation by" in line) for line in lines] == [("step 0:", True)] * 2
    assert ["2" in lines[0], "1" in lines[1]] == [True, True]
    assert difference(adapter(run), adapter(plain)) == 0
    assert run.best_validation == pytest.approx(plain.best_validation, rel=1e-5)
    assert (run.micro_batch, run.oom_fallbacks) == (4, "")


def test_without_room_for_one_preview_training_continues_and_without_room_for_one_validation_it_ends(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, dataset = setting.config, setting.dataset
    with monkeypatch.context() as patch:
        limited_to(patch, "sample", lambda _: False)
        config.sample.every = 2
        capfd.readouterr()
        assert train(into(config, tmp_path / "run", 4, 1), dataset).steps == 4
    (line,) = oom_lines(capfd)
    assert "preview" in line
    with monkeypatch.context() as patch:
        limited_to(patch, "validate", lambda _: False)
        with pytest.raises(OutOfMemory, match=r"in validation, one example at a time; try "):
            train(into(config, tmp_path / "other", 4, 1), dataset)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(OOM_MESSAGE),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_kind_of_out_of_memory_error_is_recognised(error: Exception) -> None:
    def fail() -> None:
        raise error

    cleaned: list[bool] = []
    assert try_within_memory(fail, cleanup=lambda: cleaned.append(True)) is None
    assert cleaned
    assert is_out_of_memory(error)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"):
        try_within_memory(lambda: (_ for _ in ()).throw(RuntimeError("shapes differ")))


def test_a_failed_attempt_holds_no_tensor_when_it_is_cleaned_up() -> None:
    """The traceback would keep those of every frame."""
    held: list[weakref.ref[Tensor]] = []
    gone: list[bool] = []

    def fail() -> None:
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError(OOM_MESSAGE)

    try_within_memory(fail, cleanup=lambda: gone.append(held[0]() is None))
    assert gone == [True]


@pytest.mark.parametrize("every", [0, 1, 2])
def test_offloaded_activations_give_the_same_gradients(
    setting: Setting, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, CPU memory is another copy."""
    config, dataset = setting.config, setting.dataset
    config.lora.dropout, config.trainer.activation_checkpointing = 0.2, every
    monkeypatch.setattr(activation_offload, "WORTH_BYTES", 0)
    moved: list[int] = []
    real = torch.empty_like
    task: Any = kinds.of(config).build_task(config, dataset, torch.device("cpu"))
    task.model.train()
    batch = task.collate(next(iter(task.steps(effective=2, start=0))))
    found = []
    for task.activation_offload.enabled in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", lambda like, **rest: moved.append(like.nbytes) or real(like, **rest))
            torch.manual_seed(3)
            loss = task.loss(batch)
        count = len(moved)
        loss.backward()
        found.append([parameter.grad.clone() for parameter in lora.adapter_parameters(task.model)])
        task.model.zero_grad()
    assert count > 0
    resident, away = found
    assert any(bool(gradient.any()) for gradient in resident)
    assert all(torch.equal(one, other) for one, other in zip(resident, away, strict=True))


def test_of_checkpointed_blocks_the_inputs_alone_are_offloaded_and_no_weights(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, dataset = setting.config, setting.dataset
    monkeypatch.setattr(activation_offload, "WORTH_BYTES", 0)
    away: dict[int, int] = {}
    real = torch.empty_like
    for every in (0, 1):
        config.trainer.activation_checkpointing = every
        task: Any = kinds.of(config).build_task(config, dataset, torch.device("cpu"))
        batch = task.collate(next(iter(task.steps(effective=2, start=0))))
        frozen = {p.untyped_storage().data_ptr() for p in task.model.parameters() if not p.requires_grad}
        moved: list[Tensor] = []
        task.activation_offload.enabled = True
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", lambda like, into=moved, **rest: into.append(like) or real(like, **rest))
            task.loss(batch)
        assert not any(tensor.untyped_storage().data_ptr() in frozen for tensor in moved)
        away[every] = sum(tensor.nbytes for tensor in moved)
    assert 0 < away[1] < away[0] / 2


def test_training_with_offloaded_activations(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, dataset = setting.config, setting.dataset
    config.lora.dropout, config.trainer.offload_activations = 0.2, True
    capfd.readouterr()
    resident = train(into(config, tmp_path / "resident", 2, 2), dataset)
    assert "trainer.offload_activations=true changes nothing without a CUDA GPU" in capfd.readouterr().err
    entered: list[bool] = []

    class WithoutGpu(activation_offload.ActivationOffload):
        def __init__(self, model: nn.Module, device: torch.device, enabled: bool) -> None:
            super().__init__(model, device, enabled)
            self.enabled = enabled

        def __call__(self) -> Any:
            entered.append(True)
            return super().__call__()

    monkeypatch.setattr(activation_offload, "ActivationOffload", WithoutGpu)
    away = train(into(config, tmp_path / "away", 2, 2), dataset)
    assert len(entered) >= 4 * 2  # images of different shapes need more micro-batches
    assert difference(adapter(away), adapter(resident)) == 0


def test_fallbacks_start_from_the_batch_that_failed_and_not_from_the_requested_one() -> None:
    of_task = iter(["one", "two"])
    fallbacks = OomFallbacks(64, lambda: next(of_task, None), "try less")
    assert fallbacks.summary == ""
    assert fallbacks.next_fallback(6) == "micro-batch 3"  # of 64 requested, a bucket had 6 images
    assert fallbacks.next_fallback(3) == "micro-batch 1"
    assert fallbacks.next_fallback(1) == "one"
    assert fallbacks.next_fallback(1) == "two"
    assert fallbacks.summary == "micro-batch 1 instead of 64, one, two"
    with pytest.raises(OutOfMemory, match=r"micro-batch 1 instead of 64, one, two; try less$"):
        fallbacks.next_fallback(1)


def test_fallbacks_of_an_earlier_part_of_the_run_are_applied_at_once() -> None:
    of_task = iter(["one", "two"])
    fallbacks = OomFallbacks(64, lambda: next(of_task, None), "try less")
    fallbacks.restore(8, 1)
    assert (fallbacks.micro_batch, fallbacks.applied) == (8, ["one"])
    assert fallbacks.summary == "micro-batch 8 instead of 64, one"
