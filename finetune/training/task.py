"""The seam between the one loop and the kinds of model: a task turns examples into a loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Draw = tuple[Any, int]  # (an example: whatever the task's `collate` takes, the number of the epoch)


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    items: how many things the loss sums over (images or trained tokens); names: one description per example, for
    messages ("003.jpg at timestep 871"). count: what throughput counts (images, or tokens that are not padding);
    padded_count: the same with padding. cpu_tensors: names of tensors whose values the host reads: they stay on the
    CPU.
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

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which a copy to a GPU need not wait."""
        locked = {key: value if key in self.cpu_tensors else value.pin_memory() for key, value in self.tensors.items()}
        return replace(self, tensors=locked)


class Task(Protocol):
    """One kind of model, adapters injected. No base class: anything with these members will do."""

    model: nn.Module
    unit: str
    """What throughput counts: images or tokens."""
    size: int
    """Examples to train on."""

    def steps(self, *, effective: int, start: int) -> Iterator[Sequence[Draw]]:
        """The `effective` draws of each optimiser step, without end, from step `start` on."""
        ...

    def split(self, draws: Sequence[Draw], micro_batch: int) -> Sequence[Sequence[Draw]]:
        """Draws as micro-batches of at most that many, each of one shape."""
        ...

    def worst(self, micro_batch: int) -> Sequence[Draw]:
        """The micro-batch of that many that takes most memory."""
        ...

    def collate(self, draws: Sequence[Draw]) -> Batch:
        """Examples with their epochs -> one batch; all randomness comes from (seed, example key, epoch)."""
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
        """Apply the next memory-saving fallback and return it as a setting, or None when none is left."""
        ...

    def notes(self) -> dict[str, str]:
        """Texts to show beside the curves when training starts, by title."""
        ...
