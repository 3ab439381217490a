"""Models without weights, for the memory plan: every tensor on torch's `meta` device, quantised layers imitated."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.config.schema import Quantize

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: 4 bits, a scale in 8 bits for 64 weights, and a scale in fp32 for 256 of those (arXiv 2305.14314,
§3, with bitsandbytes' block sizes)."""


def on_meta(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The module that `build` makes, without weights, of that dtype and frozen."""
    with torch.device("meta"):
        module = build()
    # Past what diffusers makes of `to`, which warns
    return nn.Module.to(module, dtype).requires_grad_(False)


def quantised(model: nn.Module, how: Quantize, head: nn.Module | None = None) -> nn.Module:
    """The model with its frozen linear layers, `head` excepted, stored as bitsandbytes stores them; adapters stay.

    Layers compute as bitsandbytes' do, as far as memory goes: each product makes a copy of its weights in the dtype of
    the arithmetic and drops it, in backward as well.
    """
    for layer in cast(Iterator[Any], model.modules()):
        if type(layer) is nn.Linear and layer is not head and not layer.weight.requires_grad:
            size = _stored(layer.weight, how)
            shape = layer.weight.shape
            layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
            cast(Any, layer).stands_for = shape
            cast(Any, layer).forward = _quantised_forward(layer, shape, how)
        elif hasattr(layer, "lora_A"):
            layer.cast_input_dtype_enabled = False  # PEFT's layers over bitsandbytes' leave the cast to autocast
    return model


def _stored(weight: Tensor, how: Quantize) -> int:
    """Bytes of a quantised weight (O, I): nf4, or int8 with an fp32 scale a row."""
    return round(NF4_BYTES * weight.numel()) if how is Quantize.nf4 else weight.numel() + 4 * weight.shape[0]


def _quantised_forward(layer: nn.Linear, shape: torch.Size, how: Quantize) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs.dtype
        product: Tensor = _Product.apply(inputs.to(dtype), shape, how is Quantize.int8)  # type: ignore[no-untyped-call]
        return product if layer.bias is None else product + layer.bias.to(dtype)

    return forward


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, shape: torch.Size, int8: bool) -> Tensor:
        ctx.shape = shape
        ctx.kept = inputs if int8 else None  # past autograd (bitsandbytes MatMul8bitLt): recomputing doesn't free it
        return nn.functional.linear(inputs, inputs.new_empty(shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream @ upstream.new_empty(ctx.shape), None, None
