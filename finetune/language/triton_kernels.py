# mypy: ignore-errors
"""The operations of `fast_kernels` in one Triton kernel each. Importing this without Triton is an ImportError.
Types aren't checked here: a kernel's arguments have none of Python's.

N tokens, D hidden channels, I channels of the feed-forward layer, H heads, E channels of a head
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers that one program of an elementwise kernel handles
WARPS = 4


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    y_ND, (count, width) = torch.empty_like(x_ND), x_ND.shape
    _rms_norm[(count,)](x_ND, weight_D, y_ND, width, eps, triton.next_power_of_2(width), num_warps=2 * WARPS)
    return y_ND


def rms_norm_backward(dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    dx_ND, (count, width) = torch.empty_like(x_ND), x_ND.shape
    block = triton.next_power_of_2(width)
    _rms_norm_backward[(count,)](dy_ND, x_ND, weight_D, dx_ND, width, eps, block, num_warps=2 * WARPS)
    return dx_ND


def rotate_(x_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor, back: bool) -> None:
    count, heads, channels = x_NHE.shape
    blocks = triton.next_power_of_2(heads), triton.next_power_of_2(channels // 2)
    sign = -1.0 if back else 1.0
    _rotate[(count,)](x_NHE, cos_NE, sin_NE, heads, channels // 2, sign, *blocks, num_warps=WARPS)


def swiglu(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    y_NI, count = torch.empty_like(gate_NI), gate_NI.numel()
    _swiglu[(triton.cdiv(count, BLOCK),)](gate_NI, up_NI, y_NI, count, BLOCK, num_warps=WARPS)
    return y_NI


def swiglu_backward_(dy_NI: Tensor, gate_NI: Tensor, up_NI: Tensor) -> None:
    count = gate_NI.numel()
    _swiglu_backward[(triton.cdiv(count, BLOCK),)](dy_NI, gate_NI, up_NI, count, BLOCK, num_warps=WARPS)


@triton.jit
def _rms_norm(x, weight, y, width, eps, BLOCK: tl.constexpr):
    channels = tl.arange(0, BLOCK)
    there = channels < width
    place = tl.program_id(0).to(tl.int64) * width + channels
    wide = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    gain = tl.load(weight + channels, mask=there, other=0.0).to(tl.float32)
    normed = (wide * scale).to(y.dtype.element_ty).to(tl.float32)  # transformers rounds here too
    tl.store(y + place, (normed * gain).to(y.dtype.element_ty), mask=there)


@triton.jit
def _rms_norm_backward(dy, x, weight, dx, width, eps, BLOCK: tl.constexpr):
    channels = tl.arange(0, BLOCK)
    there = channels < width
    place = tl.program_id(0).to(tl.int64) * width + channels
    wide = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = wide * scale
    gain = tl.load(weight + channels, mask=there, other=0.0).to(tl.float32)
    scaled = tl.load(dy + place, mask=there, other=0.0).to(tl.float32) * gain
    found = scale * (scaled - normed * (tl.sum(scaled * normed, 0) / width))
    tl.store(dx + place, found.to(dx.dtype.element_ty), mask=there)


@triton.jit
def _rotate(x, cos, sin, heads, half, sign, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None]
    there = (head < heads) & (channel < half)
    place = x + token * heads * 2 * half + head * 2 * half + channel
    turn = token * 2 * half + channel
    c = tl.load(cos + turn, mask=channel < half, other=0.0).to(tl.float32)
    s = tl.load(sin + turn, mask=channel < half, other=0.0).to(tl.float32) * sign
    one = tl.load(place, mask=there, other=0.0).to(tl.float32)
    two = tl.load(place + half, mask=there, other=0.0).to(tl.float32)
    tl.store(place, (one * c - two * s).to(x.dtype.element_ty), mask=there)
    tl.store(place + half, (two * c + one * s).to(x.dtype.element_ty), mask=there)


@triton.jit
def _swiglu(gate, up, y, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    g = tl.load(gate + place, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=there, other=0.0).to(tl.float32)
    tl.store(y + place, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=there)


@triton.jit
def _swiglu_backward(dy, gate, up, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    g = tl.load(gate + place, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=there, other=0.0).to(tl.float32)
    d = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    tl.store(dy + place, (g * share * u).to(dy.dtype.element_ty), mask=there)
    tl.store(gate + place, (d * u * share * (1 + g * (1 - share))).to(gate.dtype.element_ty), mask=there)
    tl.store(up + place, (d * g * share).to(up.dtype.element_ty), mask=there)
