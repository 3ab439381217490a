"""Optimisers and learning-rate schedules, a row each in a table."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config.schema import OptimConfig, Optimizer, Schedule, require_all
from finetune.errors import ConfigError
from finetune.memory.device import allocated_bytes

SMALL_8BIT, BLOCK_8BIT = 4096, 256  # numbers: tensors under the first keep 32-bit states; the second share a scale


@dataclass(frozen=True)
class OptimizerSpec:
    """How an optimiser is made and what it takes.

    build: from parameter groups and the settings lr, betas, eps and weight_decay. state_bytes: of all states of a
    tensor of so many numbers. needs_cuda: it has no CPU implementation. paged: its states go to CPU memory where the
    GPU is full.
    """

    build: Callable[[list[Any], dict[str, Any]], torch.optim.Optimizer]
    state_bytes: Callable[[int], float]
    needs_cuda: bool = False
    paged: bool = False


def _adamw(groups: list[Any], settings: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=_device(groups).type in ("cuda", "cpu"), **settings)


def _adamw8bit(groups: list[Any], settings: dict[str, Any]) -> torch.optim.Optimizer:
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **settings)
    return optimizer


def _paged_adamw8bit(groups: list[Any], settings: dict[str, Any]) -> torch.optim.Optimizer:
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW8bit(groups, **settings)
    return optimizer


def _two_states(numbers: int) -> float:
    """Adam's two states in fp32."""
    return 2.0 * allocated_bytes(4 * numbers)


def _two_states_8bit(numbers: int) -> float:
    """Adam's two states in bitsandbytes' 8 bit: a byte a number, and an fp32 scale a block."""
    if numbers < SMALL_8BIT:
        return _two_states(numbers)
    return 2.0 * (allocated_bytes(numbers) + allocated_bytes(4 * -(-numbers // BLOCK_8BIT)))


OPTIMIZERS = {
    Optimizer.adamw: OptimizerSpec(_adamw, _two_states),
    Optimizer.adamw8bit: OptimizerSpec(_adamw8bit, _two_states_8bit, needs_cuda=True),
    Optimizer.paged_adamw8bit: OptimizerSpec(_paged_adamw8bit, _two_states_8bit, needs_cuda=True, paged=True),
}
require_all(Optimizer, OPTIMIZERS, "training.optim.OPTIMIZERS")


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], optim: OptimConfig
) -> torch.optim.Optimizer:
    """The optimiser over parameters, or over groups of them whose `lr_scale`, if any, the loop multiplies in."""
    groups: list[Any] = list(parameters)
    settings: dict[str, Any] = {
        "lr": optim.lr,
        "betas": (optim.betas[0], optim.betas[1]),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    return OPTIMIZERS[optim.name].build(groups, settings)


def require_device(name: Optimizer, device: torch.device) -> None:
    """Raises ConfigError for an optimiser that can't serve the device."""
    if OPTIMIZERS[name].needs_cuda and device.type != "cuda":
        raise ConfigError(f"optim.name={name.name} needs a CUDA GPU; on a CPU try optim=adamw")


def optimizer_bytes(name: Optimizer, parameters: Iterable[Tensor]) -> float:
    """Memory of the states of these parameters, bytes."""
    return sum(OPTIMIZERS[name].state_bytes(parameter.numel()) for parameter in parameters)


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


def _device(groups: list[Any]) -> torch.device:
    first = groups[0]["params"][0] if isinstance(groups[0], dict) else groups[0]
    device: torch.device = first.device
    return device
