"""The one training loop: a generator that takes optimiser steps and yields what happened.

It knows no model and no data set. The caller decides when to log, validate, save, sample and stop.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.profiler import record_function

from finetune.data.order import seed_from
from finetune.errors import TrainingError
from finetune.memory.fallbacks import try_within_memory
from finetune.run import ranks
from finetune.run.progress import plural
from finetune.run.signals import Stop
from finetune.training import non_finite
from finetune.training.oom import OomFallbacks
from finetune.training.prefetch import Batches, prefetched
from finetune.training.reduction import StepTotals, reduce_step
from finetune.training.task import Batch, Draw, Task

WAITING = "waiting for data"
"""What traces call the time until a step's batches are there."""


@dataclass(frozen=True)
class Step:
    """One optimiser step. number: steps taken so far, this one included; loss: mean over items; seconds: wall clock.

    count, padded_count: as in `Batch`, of all micro-batches and processes. skip_reason: why the weights were left alone
    (a non-finite loss or gradient), None for a step that was taken. oom_fallbacks: what was changed before the step
    fitted into memory.
    """

    number: int
    loss: float
    grad_norm: float
    lr: float
    count: int
    padded_count: int
    seconds: float
    skip_reason: str | None = None
    oom_fallbacks: tuple[str, ...] = ()


def fit(
    task: Task,
    steps: Iterator[Sequence[Draw]],
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    accelerator: Accelerator,
    *,
    fallbacks: OomFallbacks,
    seed: int,
    start: int,
    clip_norm: float,
    max_bad_steps: int,
    stop: Stop | None = None,
) -> Iterator[Step]:
    """Train on the draws of each step, in micro-batches, from step `start` on, until `steps` ends.

    steps: this process's draws, per optimiser step. optimizer: prepared by `accelerator`. rate: learning rate of a step
    counted from 0. fallbacks: the size of micro-batches; a step in which memory runs out is taken again from its
    beginning with the next fallback. clip_norm: largest gradient norm, 0 for none. stop: of a signal; several processes
    agree on it here.
    Raises TrainingError after `max_bad_steps` skipped steps in a row, OutOfMemory when no fallback is left.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    task.model.train()
    bad, started = 0, start > 0
    made = prefetched(task, steps, lambda: fallbacks.micro_batch, accelerator.device)
    for number, batches in enumerate(made, start):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(number) * group.get("lr_scale", 1.0)
        mine, names, tried = forward_backward(task, batches, optimizer, accelerator, fallbacks, seed=seed, step=number)
        totals, tried = reduce_step(parameters, mine, tried, stop or Stop())
        on_norm = accelerator.clip_grad_norm_(parameters, clip_norm or math.inf)
        summed, norm = non_finite.step_unless(optimizer, accelerator, totals.loss, on_norm)
        loss = summed / totals.items
        finite = math.isfinite(loss) and math.isfinite(norm)
        optimizer.zero_grad(set_to_none=True)
        skip_reason = None if finite else non_finite.reason(loss, norm, names, accelerator)
        bad, started = (0, True) if finite else (bad + 1, started)
        seconds, counts = time.perf_counter() - began, (totals.count, totals.padded_count)
        yield Step(number + 1, loss, norm, rate(number), *counts, seconds, skip_reason, tuple(tried))
        if bad >= max_bad_steps and not _scaler_still_searching(accelerator):
            advice = non_finite.advice(accelerator, optimizer.defaults.get("lr", 0.0) if started else None)
            counted = plural(bad, "non-finite step")
            raise TrainingError(
                f"stopped after {counted} (trainer.max_bad_steps), the last one: {skip_reason}; {advice}"
            )


def forward_backward(
    task: Task,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    fallbacks: OomFallbacks,
    *,
    seed: int,
    step: int,
) -> tuple[StepTotals, list[str], list[str]]:
    """Gradients of the mean loss over all items of one step of this process.

    batches: of the step, each of at most so many draws. Returns totals, the examples' names, and the fallbacks that
    were needed: after running out of memory the step begins again, as if it were the first time.
    Raises OutOfMemory when no fallback is left.
    """
    tried: list[str] = []
    while True:
        with record_function(WAITING):
            made = batches(fallbacks.micro_batch)

        def attempt(made: Sequence[Batch] = made) -> tuple[StepTotals, list[str]]:
            items = sum(batch.items for batch in made)
            total = torch.zeros((), dtype=torch.float32, device=accelerator.device)
            for index, batch in enumerate(made):
                # LoRA dropout draws from torch's global stream: tie it to the step, so that a resumed run draws the
                # same, and to the place among the micro-batches of all processes, so that one process with all does.
                torch.manual_seed(seed_from(seed, step, index * ranks.world_size() + ranks.rank(), 0))
                with accelerator.autocast():
                    loss = task.loss(batch.to(accelerator.device))
                accelerator.backward(loss * (1 / items))  # before backward: a sum over many tokens overflows fp16
                total += loss.detach().float()
                del loss  # while it is there, parameters belong to this stream, and no CUDA graph can be captured
            count, padded = sum(batch.count for batch in made), sum(batch.padded_count for batch in made)
            return StepTotals(total, items, count, padded), [name for batch in made for name in batch.names]

        if found := try_within_memory(attempt, cleanup=lambda: optimizer.zero_grad(set_to_none=True)):
            return *found, tried
        tried.append(fallbacks.next_fallback(max(len(batch.names) for batch in made)))


def _scaler_still_searching(accelerator: Accelerator) -> bool:
    """Whether fp16's loss scale can still be lowered: early overflows are how it finds its scale, not failures."""
    return accelerator.scaler is not None and accelerator.scaler.get_scale() > 1.0
