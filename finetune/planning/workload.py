"""What a plan is made for: the values of a run that decide what a training step takes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finetune.config.schema import ModelConfig, TrainerConfig
from finetune.planning.memory_model import MemoryModel


@dataclass(frozen=True)
class Workload:
    """build: makes the memory model of a base, for a dtype of the arithmetic, on CUDA or not, in so many bytes.

    optimizer_bytes: of the states of these parameters. paged_optimizer: they go to CPU memory where the GPU is full.
    """

    model: ModelConfig
    trainer: TrainerConfig
    optimizer_bytes: Callable[[Iterable[Tensor]], float]
    paged_optimizer: bool
    build: Callable[[ModelConfig, torch.dtype, bool, float], MemoryModel]

    @property
    def effective_batch(self) -> int:
        """Examples in one optimiser step of one process."""
        return self.trainer.micro_batch * self.trainer.accumulate

    def with_offload(self) -> "Workload":
        """The same with blocks in CPU memory."""
        return replace(self, model=replace(self.model, offload=True))
