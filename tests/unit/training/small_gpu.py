"""A GPU that is too small, and the adapters of runs on it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.config.schema import Config, Schedule
from finetune.memory import checkpointing
from finetune.run.records import Run
from finetune.training import checkpoint
from finetune.training.task import Batch, Draw, Task
from tests.unit.conftest import change_tasks

OOM_MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB"


class _OutOfMemory(torch.autograd.Function):
    """Runs out of memory in the backward pass."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise torch.OutOfMemoryError(OOM_MESSAGE)


@dataclass
class Gpu:
    """A GPU with room for some micro-batches: `fits` says so by (examples, step from 0, activation checkpointing)."""

    fits: Callable[[int, int, bool], bool]
    where: str = "forward"
    step: int = -1
    checkpointed: bool = False
    losses: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Gpu":
        set_checkpointing = checkpointing.set_checkpointing

        def spied(model: Any, every: int) -> None:
            set_checkpointing(model, every)
            self.checkpointed = every == 1

        def limit(task: Task) -> None:
            steps, loss = task.steps, task.loss

            def counted(*, effective: int, start: int) -> Iterator[Sequence[Draw]]:
                for number, draws in enumerate(steps(effective=effective, start=start), start):
                    self.step = number
                    yield draws

            def limited(batch: Batch) -> Tensor:
                found = loss(batch)
                if not torch.is_grad_enabled():
                    return found
                self.losses += 1
                if self.fits(len(batch.names), self.step, self.checkpointed):
                    return found
                if self.where == "backward":
                    failing: Tensor = _OutOfMemory.apply(found)
                    return failing
                raise torch.OutOfMemoryError(OOM_MESSAGE)

            task.steps, task.loss = counted, limited  # type: ignore[method-assign]

        change_tasks(monkeypatch, limit)
        monkeypatch.setattr(checkpointing, "set_checkpointing", spied)
        return self


def at_most(limit: int) -> Callable[[int, int, bool], bool]:
    return lambda examples, step, checkpointed: examples <= limit


def adapter(run: Run) -> dict[str, Tensor]:
    return checkpoint.load(Path(run.checkpoint)).adapter


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def into(config: Config, folder: Path, micro_batch: int, accumulate: int) -> Config:
    config.run_dir = str(folder)
    config.trainer.micro_batch, config.trainer.accumulate = micro_batch, accumulate
    config.optim.schedule = Schedule.constant  # a run that is cut short must not have other rates
    return config
