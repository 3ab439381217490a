"""Optimisers and learning-rate schedules: explicit branches, no strings for code."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from finetune.config.schema import OptimConfig, Optimizer, Schedule
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
    if optim.name is not Optimizer.adamw:
        if first.device.type != "cuda":
            raise ConfigError(f"optim.name={optim.name.name} needs a CUDA GPU; on a CPU try optim=adamw")
        import bitsandbytes

        paged = optim.name is Optimizer.paged_adamw8bit
        kind: Any = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
        optimizer: torch.optim.Optimizer = kind(trained, **settings)
        return optimizer
    return torch.optim.AdamW(trained, fused=first.device.type in ("cuda", "cpu"), **settings)


def load_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Put a checkpoint's state into an optimiser; that of a paged one into paged memory, as bitsandbytes doesn't."""
    optimizer.load_state_dict(state)
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, values in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in values:
                buffer = optimizer.get_state_buffer(parameter, dtype=values[name].dtype)
                buffer.copy_(values[name])
                values[name] = buffer


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
