"""The elementwise parts of a Llama layer and their gradients: one pass over memory each, where torch takes five to ten.

N tokens, D hidden channels, I channels of the feed-forward layer, H heads, E channels of a head

Triton kernels on a GPU, torch's operations elsewhere. All compute in fp32 and round to the dtype of what they are
given. Tensors are contiguous.
"""

import torch
from torch import Tensor
from torch.nn import functional

from finetune.training import fast_ops


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root mean square norm (arXiv 1910.07467), (N, D)."""
    found: Tensor = _OPS.rms_norm(x_ND, weight_D, eps)
    return found


def rms_norm_backward(dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The gradient on x of `rms_norm`, (N, D)."""
    found: Tensor = _OPS.rms_norm_backward(dy_ND, x_ND, weight_D, eps)
    return found


def rotate_(x_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor, *, back: bool = False) -> None:
    """Rotary positions (arXiv 2104.09864) in the halves' layout, in place; `back` turns the other way: the gradient.

    cos_NE, sin_NE: both halves are alike.
    """
    _OPS.rotate_(x_NHE, cos_NE, sin_NE, back)


def swiglu(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), (N, I)."""
    found: Tensor = _OPS.swiglu(gate_NI, up_NI)
    return found


def swiglu_backward_(dy_NI: Tensor, gate_NI: Tensor, up_NI: Tensor) -> None:
    """`gate_NI` and `up_NI` become their gradients, `dy_NI` what `swiglu` gave."""
    _OPS.swiglu_backward_(dy_NI, gate_NI, up_NI)


class Plain:
    """The same in torch's operations; `triton_kernels` has it for a GPU."""

    @staticmethod
    def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return fast_ops.rms_normed(x_ND, eps)[0].to(x_ND.dtype) * weight_D

    @staticmethod
    def rms_norm_backward(dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        normed_ND, scale_N1 = fast_ops.rms_normed(x_ND, eps)
        scaled_ND = dy_ND.float() * weight_D.float()
        along_N1 = (scaled_ND * normed_ND).mean(-1, keepdim=True)
        return (scale_N1 * (scaled_ND - normed_ND * along_N1)).to(x_ND.dtype)

    @staticmethod
    def rotate_(x_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor, back: bool) -> None:
        half = x_NHE.shape[2] // 2
        one_NHE, two_NHE = x_NHE[..., :half].float(), x_NHE[..., half:].float()
        cos_N1E, sin_N1E = cos_NE[:, None, :half].float(), sin_NE[:, None, :half].float() * (-1 if back else 1)
        turned = one_NHE * cos_N1E - two_NHE * sin_N1E, two_NHE * cos_N1E + one_NHE * sin_N1E
        x_NHE.copy_(torch.cat(turned, -1))

    @staticmethod
    def swiglu(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
        return (functional.silu(gate_NI.float()) * up_NI.float()).to(gate_NI.dtype)

    @staticmethod
    def swiglu_backward_(dy_NI: Tensor, gate_NI: Tensor, up_NI: Tensor) -> None:
        gate, up, dy = gate_NI.float(), up_NI.float(), dy_NI.float()
        share = torch.sigmoid(gate)
        found = gate * share * up, dy * up * share * (1 + gate * (1 - share)), dy * gate * share
        for place, values in zip((dy_NI, gate_NI, up_NI), found, strict=True):
            place.copy_(values)


_OPS = fast_ops.define(
    "finetune",
    {
        "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
        "rms_norm_backward": "(Tensor dy, Tensor x, Tensor weight, float eps) -> Tensor",
        "rotate_": "(Tensor(a!) x, Tensor cos, Tensor sin, bool back) -> ()",
        "swiglu": "(Tensor gate, Tensor up) -> Tensor",
        "swiglu_backward_": "(Tensor(a!) dy, Tensor(b!) gate, Tensor(c!) up) -> ()",
    },
    Plain,
    "finetune.language.triton_kernels",
)
