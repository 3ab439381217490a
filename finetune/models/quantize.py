"""Frozen bases stored in 8 or 4 bits by bitsandbytes: what the libraries are told, and whether it works here."""

import logging
from typing import Any

import torch

from finetune.config import ModelConfig, Quantize
from finetune.errors import ModelError


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


def prove(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Send a gradient through one small layer of that kind. Raises ModelError where it doesn't work on the device."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 warns in every product of every step
    try:
        import bitsandbytes as bnb

        four = model.quantize is Quantize.nf4
        layer = bnb.nn.Linear4bit(64, 64) if four else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        layer.to(device)(torch.zeros(1, 64, device=device, dtype=dtype, requires_grad=True)).sum().backward()
    except (ImportError, OSError, RuntimeError, AttributeError, AssertionError) as error:
        raise ModelError(
            f"model.quantize={model.quantize.name} does not work on this {device.type} "
            f"({' '.join(str(error).split())[:200]}); try model.quantize=none"
        ) from error
