"""Batches come in order, in the size that is asked for, and those of the next step are made before it is asked."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from finetune.training.prefetch import prefetched
from finetune.training.task import Batch, Draw

STEPS: list[list[Draw]] = [[(number, 0) for number in range(step, step + 4)] for step in (0, 10, 20)]


class Line:
    """Collates numbers; `threads` says where each batch was made, `second` that those of the second step were begun."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.second = threading.Event()

    def split(self, draws: Sequence[Draw], micro_batch: int) -> list[Sequence[Draw]]:
        return [draws[first : first + micro_batch] for first in range(0, len(draws), micro_batch)]

    def collate(self, draws: Sequence[Draw]) -> Batch:
        names = tuple(str(number) for number, _ in draws)
        if "21" in names:
            raise ValueError("21 is damaged")
        self.threads.append(threading.current_thread().name)
        if "10" in names:
            self.second.set()
        return Batch({}, len(draws), names, count=len(draws), padded_count=len(draws))


def steps(line: Any, device: str) -> Iterator[Any]:
    return prefetched(line, iter(STEPS), lambda: 2, torch.device(device))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_step_has_its_batches_in_the_size_that_is_asked_for(device: str, size: int) -> None:
    following = steps(Line(), device)
    for draws in STEPS[:2]:
        found = [batch.names for batch in next(following)(size)]
        names = [str(number) for number, _ in draws]
        assert found == [tuple(names[first : first + size]) for first in range(0, 4, size)]


def test_a_gpu_finds_the_next_batches_made() -> None:
    line = Line()
    following = steps(line, "cuda")
    next(following)(2)
    assert line.second.wait(timeout=30)
    assert threading.current_thread().name not in line.threads


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_wrong_with_a_step_is_said_when_it_comes(device: str) -> None:
    following = steps(Line(), device)
    for _ in range(2):
        next(following)(2)
    with pytest.raises(ValueError, match="21 is damaged"):
        next(following)(2)
