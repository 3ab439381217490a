"""The batches of each step; on a GPU those of the next one are made in a thread while it computes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from finetune.training.task import Batch, Draw, Task

Batches = Callable[[int], list[Batch]]  # the most draws of one batch -> one step's batches


def prefetched(
    task: Task, steps: Iterator[Sequence[Draw]], micro_batch: Callable[[], int], device: torch.device
) -> Iterator[Batches]:
    """For each step what makes its batches. micro_batch: the size that they will probably be wanted in."""
    if device.type != "cuda":  # which computes where a thread would
        for draws in steps:
            yield _maker(task, draws, pinned=False)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: Batches | None = None
        for draws in steps:
            following = _ahead(pool, _maker(task, draws, pinned=True), micro_batch())
            if waiting:
                yield waiting
            waiting = following
        if waiting:
            yield waiting


def _maker(task: Task, draws: Sequence[Draw], *, pinned: bool) -> Batches:
    def make(size: int) -> list[Batch]:
        batches = [task.collate(part) for part in task.split(draws, size)]
        return [batch.pinned() for batch in batches] if pinned else batches

    return make


def _ahead(pool: ThreadPoolExecutor, make: Batches, likely: int) -> Batches:
    made = pool.submit(make, likely)
    return lambda size: made.result() if size == likely else make(size)
