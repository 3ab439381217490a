"""The seam between the one loop and the kinds of model: a task turns examples into a loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune.records import Example


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    items: how many things the loss sums over (pictures or trained tokens); names: one description per example, for
    messages ("003.jpg at timestep 871").
    """

    tensors: dict[str, Tensor]
    items: int
    names: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved = {key: value.to(device, non_blocking=True) for key, value in self.tensors.items()}
        return Batch(moved, self.items, self.names)


class Task(Protocol):
    """One kind of model, adapters injected. No base class: anything with these members will do."""

    model: nn.Module

    def collate(self, visits: Sequence[tuple[Example, int]]) -> Batch:
        """Examples with their visit numbers -> one batch; all randomness comes from (seed, example key, visit)."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The SUM of the loss over `batch.items`; the loop divides, once."""
        ...

    def validate(self, examples: Sequence[Example], micro_batch: int) -> dict[str, float]:
        """Mean unweighted loss on fixed inputs, under "mean" and by finer keys."""
        ...

    def sample(self, prompts: Sequence[str], seed: int) -> list[Any]:
        """Pictures (or texts) from fixed prompts, for previews."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The adapter's weights only: fp32 copies on the CPU."""
        ...

    def live(self) -> dict[str, Tensor]:
        """The same names, but the tensors in use themselves."""
        ...

    def load_state(self, weights: dict[str, Tensor], source: str) -> None:
        """Put adapter weights back. Raises ModelError if they don't fit."""
        ...
