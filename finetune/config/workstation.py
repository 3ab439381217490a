"""The settings of `finetune profile` and of what a run costs: a part of `finetune.config.schema`."""

from dataclasses import dataclass, field

from finetune.config.rules import at_least, must

LARGEST_BATCH = 10_000  # as that of `trainer.micro_batch`


@dataclass
class ProfileConfig:
    """Where the time of a training step goes: `finetune profile`."""

    steps: int = field(default=8, metadata=at_least(1, most=1000))
    """Optimiser steps that are timed, and as many that are traced, behind warm ones."""
    warm_up: int = field(default=3, metadata=at_least(0, most=1000))
    """Steps before them, in which kernels are chosen and CUDA graphs are captured."""
    micro_batches: list[int] = field(
        default_factory=list,
        metadata=must(
            f"be numbers in 1 … {LARGEST_BATCH:,}, each once",
            lambda sizes: len(set(sizes)) == len(sizes) and all(1 <= size <= LARGEST_BATCH for size in sizes),
            [1, 2, 4],
        ),
    )
    """Micro-batches to look at besides the one that trains, with the same effective batch where they aren't larger."""
    check: bool = False
    """Also run the change that the verdict names, and measure what it gains."""
    json: bool = False
    """Print all as JSON."""


@dataclass
class CostConfig:
    """What a run's energy costs, and what the same hours would cost elsewhere; shown in its report where known."""

    per_kwh: float = field(default=0.0, metadata=at_least(0))
    """Price of a kilowatt-hour, in `cost.currency`; 0 if unknown."""
    currency: str = "EUR"
    """Of both prices."""
    rented_gpu: str = ""
    """A GPU that could be rented instead, such as 'RTX 4090 at example.com'."""
    rented_per_hour: float = field(default=0.0, metadata=at_least(0))
    """Its price of an hour, in `cost.currency`; 0 if unknown."""
