"""Where frozen weights are and what they compute in: decided here, once.

The program loads by these values, the memory model traces by them, and the bound on CPU memory counts by them.
"""

from dataclasses import dataclass

import torch

from finetune.config.schema import ModelConfig, Quantize
from finetune.memory.block_offload import WEIGHTS_SHARE

VAE_DTYPE = torch.float32  # several released autoencoders overflow in fp16, and encoding happens once
FP32_SHARE = 0.8  # of the memory for weights in fp32; the rest is for what they compute


@dataclass(frozen=True)
class Placement:
    """dtype: of weights that aren't quantised, and of the arithmetic. offload: blocks that don't fit the GPU wait in
    CPU memory. cpu_fallback: where the GPU is too small, all of it is done on the CPU.
    """

    dtype: torch.dtype
    offload: bool
    cpu_fallback: bool


def text_encoder_dtype(*, large: bool) -> torch.dtype:
    """large: of billions of parameters, which are released in bf16."""
    return torch.bfloat16 if large else torch.float32


def image_export(model: ModelConfig, trained: torch.dtype, *, cuda: bool, weights: int, room: float) -> Placement:
    """Where the backbones are compared: in fp32 where that fits or what doesn't is offloaded, else as it was trained.

    trained: dtype of training. weights: how many the backbone has; not looked at where it is offloaded. room: bytes
    that the process may have.
    """
    plain = model.quantize is Quantize.none
    offload = model.offload and cuda
    fits = offload or 4 * weights < FP32_SHARE * room
    # diffusers quantises on GPUs alone
    return Placement(torch.float32 if plain and fits else trained, offload, cpu_fallback=cuda and plain)


def language_export(model: ModelConfig, *, cuda: bool, dora: bool) -> Placement:
    """Where language models are compared: in fp32, a quantised one computing in it.

    In fp32 a base may not fit the GPU that it was trained on in 16 bit: then blocks wait in CPU memory. DoRA needs all
    weights where it computes.
    """
    in_fp32 = model.quantize is Quantize.none and not dora
    return Placement(torch.float32, offload=cuda and (model.offload or in_fp32), cpu_fallback=cuda)


def fp32_cpu_bytes(weights: int, room: float) -> float:
    """Of a model that is loaded in fp32 and offloaded: all of it, and once more the blocks that stay in CPU memory."""
    whole = 4.0 * weights
    return whole + max(0.0, whole - WEIGHTS_SHARE * room)
