"""What a plan is made for: the values of a run that decide what a training step takes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finetune.config.schema import ModelConfig, TrainerConfig
from finetune.planning.memory_model import MemoryModel

GLANCE_S = 1.0  # that a plan looks at examples as training does


@dataclass(frozen=True)
class Examples:
    """What there is to train on, by a glance at the data: files are counted, not read.

    to_encode: images, held-out ones included; 0 where encoding takes no time worth a word. to_caption: of them those
    without a caption. per_epoch: images that are trained on, or packs of conversations. cached: entries of the cache,
    mirrored images and what is held out included. measured: not guessed from the size of files.
    """

    to_encode: int
    to_caption: int
    per_epoch: float
    cached: float
    measured: bool


@dataclass(frozen=True)
class Workload:
    """build: makes the memory model of a base, for a dtype of the arithmetic, on CUDA or not, in so many bytes.

    examples: None where the data can't be counted. optimizer_bytes: of the states of these parameters. paged_optimizer:
    they go to CPU memory where the GPU is full.
    """

    model: ModelConfig
    trainer: TrainerConfig
    examples: Examples | None
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


def validations(trainer: TrainerConfig) -> int:
    """How often a run validates, the first time before step 1."""
    return 1 + trainer.steps // trainer.validate_every if trainer.validate_every else 0


def previews(trainer: TrainerConfig, every: int) -> int:
    """How often a run makes previews: before the first step, after the last one, and `every` so many between."""
    return 2 + ((trainer.steps - 1) // every if every else 0)
