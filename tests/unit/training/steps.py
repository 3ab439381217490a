"""A task with all that a few steps of the loop need, as the train stage puts it together."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from finetune import kinds
from finetune.adapters import lora
from finetune.config.schema import Config
from finetune.memory.device import pick_device
from finetune.training.accelerator import build_accelerator, prepare
from finetune.training.loop import Step, fit
from finetune.training.oom import OomFallbacks
from finetune.training.optim import build_optimizer, learning_rate
from finetune.training.task import Draw, Task


def prepared(config: Config, dataset: Any) -> tuple[Task, Any, torch.optim.Optimizer]:
    """Task, accelerator and optimiser."""
    device = pick_device(config.hardware.device)
    accelerator = build_accelerator(config.trainer.precision, device)
    task = kinds.of(config).build_task(config, dataset, device)
    optimizer = build_optimizer(lora.parameter_groups(task.model, config.optim.lora_plus), config.optim)
    task.model, optimizer = prepare(accelerator, task.model, optimizer)
    return task, accelerator, optimizer


def draws(task: Task, config: Config, steps: int, rank: int = 0, processes: int = 1) -> Iterator[Sequence[Draw]]:
    """What `rank` of so many processes trains on in each step."""
    effective = config.trainer.micro_batch * config.trainer.accumulate * processes
    for chunk in islice(task.steps(effective=effective, start=0), steps):
        yield chunk[rank::processes]


def fallbacks(task: Task, config: Config) -> OomFallbacks:
    """From the configuration's micro-batch down."""
    return OomFallbacks(config.trainer.micro_batch, task.reduce_memory, "try a larger GPU")


def run(config: Config, dataset: Any, *, poison: int | None = None, steps: int = 4) -> tuple[Task, list[Step]]:
    """Train a few steps; the loss of step number `poison` (from 0) is NaN."""
    task, accelerator, optimizer = prepared(config, dataset)
    factor, loss_of = 1.0, task.loss

    def poisoned() -> Iterator[Sequence[Draw]]:
        nonlocal factor
        for number, mine in enumerate(draws(task, config, steps)):
            factor = math.nan if number == poison else 1.0
            yield mine

    task.loss = lambda batch: factor * loss_of(batch)  # type: ignore[method-assign]
    trainer = config.trainer
    taken = fit(
        task,
        poisoned(),
        optimizer,
        lambda number: learning_rate(config.optim, number, steps),
        accelerator,
        fallbacks=fallbacks(task, config),
        seed=config.seed,
        start=0,
        clip_norm=trainer.clip_norm,
        max_bad_steps=trainer.max_bad_steps,
    )
    return task, list(taken)
