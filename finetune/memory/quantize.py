"""Frozen bases stored in 8 or 4 bits by bitsandbytes: what the libraries are told, and whether it works here."""

import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.config.schema import ModelConfig, Quantize
from finetune.errors import ModelError, is_out_of_memory

NF4_BLOCK = 64  # weights that share a scale (arXiv 2305.14314, §3)


def settings(quantize: Quantize, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a `BitsAndBytesConfig`, transformers' or diffusers'. dtype: of the arithmetic."""
    if quantize is Quantize.int8:
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": torch.uint8,
    }


def as_code(quantize: Quantize, dtype: torch.dtype) -> str:
    """The `BitsAndBytesConfig` of `settings` as Python; it needs `torch`."""
    return f"BitsAndBytesConfig({', '.join(f'{key}={value!r}' for key, value in settings(quantize, dtype).items())})"


def prove(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Send a gradient through one small layer of that kind. Raises ModelError where it doesn't work on the device."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 warns in every product of every step
    try:
        import bitsandbytes as bnb

        four = model.quantize is Quantize.nf4
        layer = bnb.nn.Linear4bit(64, 64) if four else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        layer.to(device)(torch.zeros(1, 64, device=device, dtype=dtype, requires_grad=True)).sum().backward()
    except (ImportError, OSError, RuntimeError, AttributeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"model.quantize={model.quantize.name} does not work on this {device.type} "
            f"({' '.join(str(error).split())[:200]}); try model.quantize=none"
        ) from error


def prepare(model: nn.Module) -> None:
    """Make the layers of a quantised model, if it is one, fit to train through; changes it."""
    if not getattr(model, "is_quantized", False):
        return
    import bitsandbytes as bnb

    for layer in cast(Iterator[Any], model.modules()):
        if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            # They return the dtype that they are given, in autocast too. Layer norms give fp32 there, and all that lies
            # between two layers would take twice the memory.
            layer.register_forward_pre_hook(_follow_autocast)
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # bitsandbytes' layout for CPU inference: the first evaluation would convert the weights to it for good, and
            # whatever is trained afterwards would get no gradient through them.
            layer.support_avx512bf16_for_cpu = False


def dense(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a frozen linear layer (O, I), as it is or made of 4 bits; after `unnest` with fewer kernels."""
    if (shape := getattr(layer, "stands_for", None)) is not None:
        return layer.weight.new_empty(shape, dtype=dtype)  # type: ignore[no-any-return]
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.to(dtype)  # type: ignore[no-any-return]
    packed = layer.weight.data.view(-1, 1)
    made: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        packed, layer.scales, state.blocksize, state.quant_type, state.shape, dtype
    )
    return made


def unnest(layer: Any) -> None:
    """Keep the scales of a 4-bit layer in fp32 beside it: nested, each use makes them of 8 bits again."""
    if (shape := getattr(layer, "stands_for", None)) is not None:
        scales = torch.empty(shape.numel() // NF4_BLOCK, device=layer.weight.device)
    else:
        import bitsandbytes.functional as bnb

        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            return
        scales = state.absmax
        if state.nested:
            scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        scales = scales.float()
    layer.register_buffer("scales", scales, persistent=False)


def _follow_autocast(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    (values,) = inputs
    device = values.device.type
    return (values.to(torch.get_autocast_dtype(device)),) if torch.is_autocast_enabled(device) else None
