# mypy: ignore-errors
"""The operations of `fast_kernels` in one Triton kernel each. Importing this without Triton is an ImportError.
Types aren't checked here: a kernel's arguments have none of Python's.

B images, L tokens, N of all images, H heads, E channels of a head, I channels of the feed-forward layer, of which
`wide` has two halves: values and gates
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers that one program handles
WARPS = 4


def turn(x_BLHE: Tensor, weight_E: Tensor, cos_LE: Tensor, sin_LE: Tensor, eps: float) -> Tensor:
    y_BLHE, sizes = torch.empty_like(x_BLHE), _sizes(x_BLHE)
    _turn[(x_BLHE.shape[0] * x_BLHE.shape[1],)](x_BLHE, weight_E, cos_LE, sin_LE, y_BLHE, eps, *sizes, num_warps=WARPS)
    return y_BLHE


def turn_backward(
    dy_BLHE: Tensor, x_BLHE: Tensor, weight_E: Tensor, cos_LE: Tensor, sin_LE: Tensor, eps: float
) -> Tensor:
    dx_BLHE, sizes, count = torch.empty_like(x_BLHE), _sizes(x_BLHE), x_BLHE.shape[0] * x_BLHE.shape[1]
    _turn_backward[(count,)](dy_BLHE, x_BLHE, weight_E, cos_LE, sin_LE, dx_BLHE, eps, *sizes, num_warps=WARPS)
    return dx_BLHE


def _sizes(x_BLHE: Tensor) -> tuple[int, ...]:
    _, length, heads, channels = x_BLHE.shape
    half = channels // 2
    return length, heads, half, triton.next_power_of_2(heads), triton.next_power_of_2(half)


def geglu(wide_NJ: Tensor) -> Tensor:
    rows, width = len(wide_NJ), wide_NJ.shape[1] // 2
    y_NI = wide_NJ.new_empty(rows, width)
    _geglu[(rows, triton.cdiv(width, BLOCK))](wide_NJ, y_NI, width, BLOCK, num_warps=WARPS)
    return y_NI


def geglu_backward_(dy_NI: Tensor, wide_NJ: Tensor) -> None:
    rows, width = dy_NI.shape
    _geglu_backward[(rows, triton.cdiv(width, BLOCK))](dy_NI, wide_NJ, width, BLOCK, num_warps=WARPS)


@triton.jit
def _turn(x, weight, cos, sin, y, eps, length, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    place, there, pair, known, position = _places(length, heads, half, HEADS, HALF)
    one, two = _pair(x + place, there)
    scale = tl.rsqrt(tl.sum(one * one + two * two, 1) / (2 * half) + eps)[:, None]
    gain_one, gain_two = _pair(weight + pair, known)
    one, two = one * scale * gain_one, two * scale * gain_two
    c = tl.load(cos + position, mask=known, other=0.0).to(tl.float32)
    s = tl.load(sin + position, mask=known, other=0.0).to(tl.float32)
    tl.store(y + place, (one * c - two * s).to(y.dtype.element_ty), mask=there)
    tl.store(y + place + 1, (two * c + one * s).to(y.dtype.element_ty), mask=there)


@triton.jit
def _turn_backward(dy, x, weight, cos, sin, dx, eps, length, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    place, there, pair, known, position = _places(length, heads, half, HEADS, HALF)
    one, two = _pair(x + place, there)
    scale = tl.rsqrt(tl.sum(one * one + two * two, 1) / (2 * half) + eps)[:, None]
    one, two = one * scale, two * scale
    d_one, d_two = _pair(dy + place, there)
    c = tl.load(cos + position, mask=known, other=0.0).to(tl.float32)
    s = tl.load(sin + position, mask=known, other=0.0).to(tl.float32)
    gain_one, gain_two = _pair(weight + pair, known)
    on_one, on_two = (d_one * c + d_two * s) * gain_one, (d_two * c - d_one * s) * gain_two
    along = (tl.sum(on_one * one + on_two * two, 1) / (2 * half))[:, None]
    tl.store(dx + place, (scale * (on_one - one * along)).to(dx.dtype.element_ty), mask=there)
    tl.store(dx + place + 1, (scale * (on_two - two * along)).to(dx.dtype.element_ty), mask=there)


@triton.jit
def _places(length, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Of this token's pairs, by head; of a head's pairs; and of those of its position."""
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], 2 * tl.arange(0, HALF)[None]
    known = pair < 2 * half
    place = token * heads * 2 * half + head * 2 * half + pair
    return place, (head < heads) & known, pair, known, token % length * 2 * half + pair


@triton.jit
def _pair(start, there):
    """A number and its neighbour, in fp32."""
    one = tl.load(start, mask=there, other=0.0).to(tl.float32)
    two = tl.load(start + 1, mask=there, other=0.0).to(tl.float32)
    return one, two


@triton.jit
def _geglu(wide, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = channels < width
    place = wide + row * 2 * width + channels
    value = tl.load(place, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(place + width, mask=there, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    active = (gate * share).to(y.dtype.element_ty).to(tl.float32)  # torch rounds here too
    tl.store(y + row * width + channels, (value * active).to(y.dtype.element_ty), mask=there)


@triton.jit
def _geglu_backward(dy, wide, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = channels < width
    place, out = wide + row * 2 * width + channels, dy + row * width + channels
    value = tl.load(place, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(place + width, mask=there, other=0.0).to(tl.float32)
    d = tl.load(out, mask=there, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    active = (gate * share).to(dy.dtype.element_ty).to(tl.float32)
    tl.store(out, (value * active).to(dy.dtype.element_ty), mask=there)
    tl.store(place, (d * active).to(wide.dtype.element_ty), mask=there)
    tl.store(place + width, (d * value * (share + gate * density)).to(wide.dtype.element_ty), mask=there)
