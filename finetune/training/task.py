"""The seam between the one loop and the kinds of model: a task turns examples into a loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Draw = tuple[Any, int]  # (an example: whatever the task's `collate` takes, the number of the visit)


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    items: how many things the loss sums over (images or trained tokens); names: one description per example, for
    messages ("003.jpg at timestep 871"). units: what throughput counts (images, or tokens that are not padding);
    slots: the same with padding. shaping: names of tensors that stay on the CPU, where reading them makes no GPU wait.
    """

    tensors: dict[str, Tensor]
    items: int
    names: tuple[str, ...]
    count: int
    padded_count: int
    cpu_tensors: frozenset[str] = frozenset()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved = {
            key: value if key in self.cpu_tensors else value.to(device, non_blocking=True)
            for key, value in self.tensors.items()
        }
        return replace(self, tensors=moved)


class Task(Protocol):
    """One kind of model, adapters injected. No base class: anything with these members will do."""

    model: nn.Module
    unit: str
    """What throughput counts: images or tokens."""
    size: int
    """Examples to train on."""

    def steps(self, *, effective: int, start: int) -> Iterator[Sequence[Draw]]:
        """The `effective` visits of each optimiser step, without end, from step `start` on."""
        ...

    def split(self, draws: Sequence[Draw], micro_batch: int) -> Sequence[Sequence[Draw]]:
        """Visits as micro-batches of at most that many, each of one shape."""
        ...

    def worst(self, micro_batch: int) -> Sequence[Draw]:
        """The micro-batch of that many that takes most memory."""
        ...

    def collate(self, draws: Sequence[Draw]) -> Batch:
        """Examples with their visit numbers -> one batch; all randomness comes from (seed, example key, visit)."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The SUM of the loss over `batch.items`; the loop divides, once."""
        ...

    def validate(self, micro_batch: int) -> dict[str, float]:
        """Mean unweighted loss of the held-out examples on fixed inputs, under "mean" and by finer keys."""
        ...

    def sample(self, prompts: Sequence[str], seed: int) -> list[Any]:
        """One preview for each prompt: a PIL image, or a text."""
        ...

    def reduce_memory(self) -> str | None:
        """Take the next measure that spends time for memory, and name it as a setting; None when none is left."""
        ...

    def notes(self) -> dict[str, str]:
        """Texts to show beside the curves when training starts, by title."""
        ...
