"""Recomputing activations in the backward pass (arXiv 1604.06174), for all or some of a model's blocks.

The blocks are those that diffusers and transformers themselves hand to a checkpointing function: a transformer's
layers, a UNet's transformer blocks and residual blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune.errors import ModelError

SELF_CHECKPOINTING = "recomputed_by_itself"  # attribute of a block that needs nobody to recompute it


def set_checkpointing(model: nn.Module, every: int) -> None:
    """Recompute every `every`-th block in backward: 1 is each block, 0 none, 2 the first, third, fifth …

    Blocks count in the order in which a forward pass meets them. Gradients stay as they are, bit for bit: the random
    numbers of dropout are drawn again. Raises ModelError for a model without such blocks.
    """
    if has_self_checkpointing(model):
        every = 1  # a model that has to keep blocks in CPU memory has no room for activations
    found = checkpointable(model)
    if every and not found:
        raise ModelError(
            f"{type(model).__name__} has no blocks that can be recomputed; try trainer.activation_checkpointing=0"
        )
    chosen = _Every(every)
    for module in found:
        module.gradient_checkpointing = every > 0
        module._gradient_checkpointing_func = chosen


def has_self_checkpointing(model: nn.Module) -> bool:
    """Whether some blocks recompute themselves, as those in CPU memory do."""
    return any(getattr(module, SELF_CHECKPOINTING, False) for module in model.modules())


def checkpointable(model: nn.Module) -> list[Any]:
    """The modules whose flag decides whether blocks are recomputed; none in a model that can't do it."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


class _Every:
    """What the libraries call in place of a block, as `function(block, *inputs)`."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.numbers: dict[nn.Module, int] = {}

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        block = _block(function)
        number = self.numbers.setdefault(block, len(self.numbers))
        if number % self.every or getattr(block, SELF_CHECKPOINTING, False):
            return function(*inputs)
        return checkpoint(function, *inputs, use_reentrant=False)


def _block(function: Any) -> nn.Module:
    """The module behind what a library passes: itself, its method, or (transformers 5) its class's, bound in part."""
    if isinstance(function, functools.partial):
        if function.args and isinstance(function.args[0], nn.Module):
            return function.args[0]
        function = function.func
    return function if isinstance(function, nn.Module) else function.__self__
