"""Fast transformer blocks of image models: those that are known compute in functions with a backward pass of their own.

B images, L tokens of each, N of all, D channels, O output features of a linear layer
"""

from typing import Any

import torch

from finetune.diffusion import fast_flux, fast_unet
from finetune.training.fast_linear import renew

ROOMS = (fast_unet, fast_flux)


def install(model: Any, dtype: torch.dtype) -> bool:
    """Let a model's transformer blocks compute fast where that is the same; False where it has none that are known.

    model: with its adapters. dtype: of the arithmetic. For settings that `fast_linear.reason_against` has nothing
    against.
    """
    blocks: list[Any] = []
    for block in list(model.modules()):
        for room in ROOMS:
            if made := room.fast(block, dtype):
                block.fast, block.__class__ = made
                blocks.append(block)
    if blocks:
        model.register_forward_pre_hook(lambda *_: renew(blocks))
    return bool(blocks)
