"""Which of some micro-batches takes an optimiser step fastest: each takes a real one, of which nothing stays."""

import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from finetune.errors import OutOfMemory
from finetune.training.loop import forward_backward
from finetune.training.oom import OomFallbacks
from finetune.training.prefetch import Batches
from finetune.training.task import Draw, Task

WARM_UP, TIMED = 2, 3  # times that each takes the step: at the second CUDA graphs are captured
EACH = 1 + WARM_UP + TIMED  # steps of each, with one of the largest examples
REPAID = 40  # times as many steps as are measured make a run long enough
GAIN = 0.03  # of the time: what less is gained may be noise, and another choice each time would change the last bits


def repays(candidates: int, steps: int) -> bool:
    """Whether so many steps are worth the measurement of so many micro-batches."""
    return candidates > 1 and steps >= REPAID * EACH * candidates


def seconds(
    sizes: Sequence[int],
    task: Task,
    draws: Sequence[Draw],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> dict[int, float]:
    """Of forward and backward of a step of these draws, by micro-batch; one that memory has no room for is left out.

    optimizer: over the trained parameters, to forget their gradients; it takes no step.
    """
    found = {size: _seconds(size, task, draws, optimizer, accelerator) for size in sizes}
    return {size: each for size, each in found.items() if each is not None}


def fastest(times: dict[int, float], planned: int) -> int:
    """The micro-batch to train with: the planned one unless another is clearly faster."""
    best = min(times, key=lambda size: times[size])
    return best if planned not in times or times[best] < (1 - GAIN) * times[planned] else planned


def _seconds(
    size: int,
    task: Task,
    draws: Sequence[Draw],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> float | None:
    largest, times = [*task.worst(1)] * len(draws), []
    for step in [largest, *[draws] * (WARM_UP + TIMED)]:
        fallbacks = OomFallbacks(size, lambda: None, "")
        batches = _made(task, step, size)
        began = time.perf_counter()
        try:
            totals, _, needed = forward_backward(task, batches, optimizer, accelerator, fallbacks, seed=0, step=0)
        except OutOfMemory:
            return None
        float(totals.loss)  # waits for the GPU
        times.append(time.perf_counter() - began)
        optimizer.zero_grad(set_to_none=True)
        if needed:
            return None
    return min(times[-TIMED:])


def _made(task: Task, draws: Sequence[Draw], size: int) -> Batches:
    """Batches that are there before a step, as a thread makes them."""
    ready = [task.collate(part) for part in task.split(draws, size)]
    return lambda asked: ready if asked == size else [task.collate(part) for part in task.split(draws, asked)]
