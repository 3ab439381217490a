# mypy: ignore-errors
"""The operations of `fast_kernels` in one Triton kernel each. Importing this without Triton is an ImportError.
Types aren't checked here: a kernel's arguments have none of Python's.

N tokens, I channels of the feed-forward layer, of which `wide` has two halves: values and gates
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers that one program handles
WARPS = 4


def geglu(wide_NJ: Tensor) -> Tensor:
    rows, width = len(wide_NJ), wide_NJ.shape[1] // 2
    y_NI = wide_NJ.new_empty(rows, width)
    _geglu[(rows, triton.cdiv(width, BLOCK))](wide_NJ, y_NI, width, BLOCK, num_warps=WARPS)
    return y_NI


def geglu_backward_(dy_NI: Tensor, wide_NJ: Tensor) -> None:
    rows, width = dy_NI.shape
    _geglu_backward[(rows, triton.cdiv(width, BLOCK))](dy_NI, wide_NJ, width, BLOCK, num_warps=WARPS)


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
