"""Optimisers and learning-rate schedules: explicit branches, no strings for code."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from finetune.config import OptimConfig, Optimizer, Schedule
from finetune.errors import ConfigError


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], optim: OptimConfig
) -> torch.optim.Optimizer:
    """The optimiser over parameters, or over groups of them that may carry an `lr_scale`, which the loop multiplies in.

    Raises ConfigError where bitsandbytes can't serve the device.
    """
    trained: list[Any] = list(parameters)
    first = trained[0]["params"][0] if isinstance(trained[0], dict) else trained[0]
    settings: dict[str, Any] = {
        "lr": optim.lr,
        "betas": (optim.betas[0], optim.betas[1]),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    if optim.name is Optimizer.adamw8bit:
        if first.device.type != "cuda":
            raise ConfigError("optim.name=adamw8bit needs a CUDA card; on a CPU try optim=adamw")
        import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(trained, **settings)
        return optimizer
    return torch.optim.AdamW(trained, fused=first.device.type in ("cuda", "cpu"), **settings)


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Rate of optimiser step `step` (counted from 0) of `steps`: a pure function, so a resumed run needs no state."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule is Schedule.constant:
        return optim.lr
    left = (steps - step) / max(1, steps - optim.warmup_steps)
    if optim.schedule is Schedule.linear:
        return optim.lr * left
    return optim.lr * 0.5 * (1 - math.cos(math.pi * left))
