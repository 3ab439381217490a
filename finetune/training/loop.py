"""The one training loop: a generator that takes optimiser steps and yields what happened.

It knows no model and no data set. Whoever iterates decides when to log, validate, save, draw and stop.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from finetune.data.order import seed_from
from finetune.errors import TrainingError
from finetune.memory.fallbacks import try_within_memory
from finetune.run import distributed
from finetune.training.oom import OomFallbacks
from finetune.training.reduction import StepTotals, all_reduce_step
from finetune.training.signals import Stop
from finetune.training.task import Batch, Draw, Task


@dataclass(frozen=True)
class Step:
    """One optimiser step. number: steps taken so far, this one included; loss: mean over items; seconds: wall clock.

    units, slots: as in `Batch`, of all micro-batches and processes.
    `skip_reason` says why the weights were left alone (a non-finite loss or gradient), None for a step that was taken.
    eased: what gave way before the step fitted into memory.
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
    """Train on the visits of each step, in micro-batches, from step `start` on, until `steps` ends.

    steps: per optimiser step this process's visits. optimizer: prepared by `accelerator`. rate: learning rate of a step
    counted from 0. fallbacks: the size of micro-batches; where memory runs out in a step, that step is taken again from
    its beginning one rung further down. clip_norm: largest gradient norm, 0 for none. stop: of a signal; several
    processes agree on it here.
    Raises TrainingError after `max_bad_steps` refused steps in a row, OutOfMemory at the foot of the fallbacks.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    task.model.train()
    bad = 0
    for number, draws in enumerate(steps, start):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(number) * group.get("lr_scale", 1.0)
        oom_fallbacks: list[str] = []
        parts = task.split(draws, fallbacks.micro_batch)
        while (attempt := _attempt(task, parts, optimizer, accelerator, seed=seed, step=number)) is None:
            oom_fallbacks.append(fallbacks.next_fallback(max(map(len, parts))))
            parts = task.split(draws, fallbacks.micro_batch)
        share, names = attempt
        if distributed.world_size() > 1:
            share, oom_fallbacks = _together(parameters, share, oom_fallbacks, stop or Stop())
        loss = share.loss / share.items
        norm = float(_gradient_norm(parameters, accelerator, clip_norm))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite or accelerator.scaler is not None:  # the fp16 scaler must see a bad step to lower its scale
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        skip_reason = None if finite else _why(loss, norm, distributed.gather(names), accelerator)
        bad = 0 if finite else bad + 1
        seconds = time.perf_counter() - began
        yield Step(
            number + 1,
            loss,
            norm,
            rate(number),
            share.count,
            share.padded_count,
            seconds,
            skip_reason,
            tuple(oom_fallbacks),
        )
        if bad >= max_bad_steps and not _scaler_still_searching(accelerator):
            raise TrainingError(
                f"{bad} steps in a row were not finite, the last one: {skip_reason}; "
                "try a lower optim.lr, trainer.precision=bf16 or fp32, or leave these examples out"
            )


def dry_run(
    task: Task,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    fallbacks: OomFallbacks,
    micro_batches: int,
) -> list[str]:
    """Take a step of the worst micro-batches there may be, so many of them, and undo it; returns what gave way for it.

    optimizer: over the task's trained parameters and for this alone. Its state is there before the step, as it is in
    all steps of the run but the first, and stays. Raises OutOfMemory at the foot of the fallbacks.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    task.model.train()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    oom_fallbacks: list[str] = []
    parts = [task.worst(fallbacks.micro_batch)] * micro_batches
    while _attempt(task, parts, optimizer, accelerator, seed=0, step=0) is None:
        oom_fallbacks.append(fallbacks.next_fallback(len(parts[0])))
        parts = [task.worst(fallbacks.micro_batch)] * micro_batches
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return oom_fallbacks


def _attempt(
    task: Task,
    parts: Sequence[Sequence[Draw]],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    seed: int,
    step: int,
) -> tuple[StepTotals, list[str]] | None:
    """Gradients of one step in those micro-batches: their share in it, and names; None where memory ran out.

    A failed attempt leaves no gradients, and its successor draws from streams of its own, as if it were the first.
    """

    def backward() -> tuple[StepTotals, list[str]]:
        micro_batches = [task.collate(part) for part in parts]
        names = [name for batch in micro_batches for name in batch.names]
        return _backward(task, micro_batches, accelerator, seed=seed, step=step), names

    return try_within_memory(backward, drop=lambda: optimizer.zero_grad(set_to_none=True))


def _backward(
    task: Task,
    micro_batches: Sequence[Batch],
    accelerator: Accelerator,
    *,
    seed: int,
    step: int,
) -> StepTotals:
    """Gradients of the mean loss over all items of these micro-batches; returns what they come to."""
    device = accelerator.device
    items = sum(batch.items for batch in micro_batches)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for index, batch in enumerate(micro_batches):
        # LoRA dropout draws from torch's global stream: tie it to the step, so that a resumed run draws the same, and
        # to the place among the micro-batches of all processes, so that one process with all of them does too.
        torch.manual_seed(seed_from(seed, step, index * distributed.world_size() + distributed.rank(), 0))
        with accelerator.autocast():
            loss = task.loss(batch.to(device))
        accelerator.backward(loss * (1 / items))  # before backward: a sum over thousands of tokens overflows fp16
        total += loss.detach().float()
    count, padded_count = (
        sum(batch.count for batch in micro_batches),
        sum(batch.padded_count for batch in micro_batches),
    )
    return StepTotals(float(total), items, count, padded_count)


def _together(
    parameters: Sequence[torch.nn.Parameter], mine: StepTotals, oom_fallbacks: list[str], stop: Stop
) -> tuple[StepTotals, list[str]]:
    """The step of all processes, and what gave way in any: where memory runs out in one, the others only wait."""
    share = all_reduce_step(parameters, replace(mine, flagged_ranks=int(bool(oom_fallbacks) or stop.noted is not None)))
    if share.flagged_ranks:
        told = distributed.gather((oom_fallbacks, stop.noted))
        oom_fallbacks = list(dict.fromkeys(line for lines, _ in told for line in lines))
        stop.number = next((number for _, number in told if number is not None), None)
    return share, oom_fallbacks


def _gradient_norm(parameters: list[torch.nn.Parameter], accelerator: Accelerator, clip_norm: float) -> torch.Tensor:
    norm = accelerator.clip_grad_norm_(parameters, clip_norm if clip_norm else math.inf)
    return torch.as_tensor(norm)


def _scaler_still_searching(accelerator: Accelerator) -> bool:
    """Whether fp16's loss scale can still be lowered: early overflows are how it finds its scale, not failures."""
    return accelerator.scaler is not None and accelerator.scaler.get_scale() > 1.0


def _why(loss: float, norm: float, names: Sequence[Sequence[str]], accelerator: Accelerator) -> str:
    """names: of the examples, by process."""
    on = "; ".join(itertools.chain.from_iterable(names))
    return f"loss {loss:g}, gradient norm {norm:g} in {_arithmetic(accelerator)} on {on}"


def _arithmetic(accelerator: Accelerator) -> str:
    return "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)
