"""Norms and activations of transformer blocks and their gradients: one pass over memory each.

B images, L tokens, N of all images, D channels, H heads, E channels of a head, I channels of the feed-forward layer, J
twice as many: values, and behind them gates

Triton kernels on a GPU, torch's operations elsewhere. All compute in fp32 and round to the dtype of what they are
given. Tensors are contiguous.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.training import fast_ops


def layer_norm(norm: Any, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a module of layer norm gives, and mean and inverse deviation of each token."""
    return torch.native_layer_norm(x_ND, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def layer_norm_backward(norm: Any, dy_ND: Tensor, x_ND: Tensor, mean_N1: Tensor, scale_N1: Tensor) -> Tensor:
    """The gradient on x of `layer_norm`."""
    wanted = [True, False, False]
    dx_ND: Tensor = torch.ops.aten.native_layer_norm_backward(
        dy_ND, x_ND, norm.normalized_shape, mean_N1, scale_N1, norm.weight, norm.bias, wanted
    )[0]
    return dx_ND


def turn(x_BLHE: Tensor, weight_E: Tensor, cos_LE: Tensor, sin_LE: Tensor, eps: float) -> Tensor:
    """Root mean square norm of each head (arXiv 1910.07467), then rotary positions (arXiv 2104.09864) of neighbours.

    cos_LE, sin_LE: both of a pair are alike.
    """
    found: Tensor = _OPS.turn(x_BLHE, weight_E, cos_LE, sin_LE, eps)
    return found


def turn_backward(
    dy_BLHE: Tensor, x_BLHE: Tensor, weight_E: Tensor, cos_LE: Tensor, sin_LE: Tensor, eps: float
) -> Tensor:
    """The gradient on x of `turn`."""
    found: Tensor = _OPS.turn_backward(dy_BLHE, x_BLHE, weight_E, cos_LE, sin_LE, eps)
    return found


def geglu(wide_NJ: Tensor) -> Tensor:
    """value * gelu(gate) (arXiv 2002.05202), (N, I)."""
    found: Tensor = _OPS.geglu(wide_NJ)
    return found


def geglu_backward_(dy_NI: Tensor, wide_NJ: Tensor) -> None:
    """`wide_NJ` becomes its gradient, `dy_NI` what `geglu` gave."""
    _OPS.geglu_backward_(dy_NI, wide_NJ)


class Plain:
    """The same in torch's operations; `triton_kernels` has it for a GPU."""

    @staticmethod
    def turn(x_BLHE: Tensor, weight_E: Tensor, cos_LE: Tensor, sin_LE: Tensor, eps: float) -> Tensor:
        normed_BLHE, _ = fast_ops.rms_normed(x_BLHE, eps)
        return _rotated(normed_BLHE * weight_E.float(), cos_LE, sin_LE).to(x_BLHE.dtype)

    @staticmethod
    def turn_backward(
        dy_BLHE: Tensor, x_BLHE: Tensor, weight_E: Tensor, cos_LE: Tensor, sin_LE: Tensor, eps: float
    ) -> Tensor:
        normed_BLHE, scale_BLH1 = fast_ops.rms_normed(x_BLHE, eps)
        scaled_BLHE = _rotated(dy_BLHE.float(), cos_LE, -sin_LE) * weight_E.float()
        along_BLH1 = (scaled_BLHE * normed_BLHE).mean(-1, keepdim=True)
        return (scale_BLH1 * (scaled_BLHE - normed_BLHE * along_BLH1)).to(x_BLHE.dtype)

    @staticmethod
    def geglu(wide_NJ: Tensor) -> Tensor:
        value_NI, gate_NI = wide_NJ.chunk(2, dim=1)
        return value_NI * functional.gelu(gate_NI)

    @staticmethod
    def geglu_backward_(dy_NI: Tensor, wide_NJ: Tensor) -> None:
        value_NI, gate_NI = (half_NI.float() for half_NI in wide_NJ.chunk(2, dim=1))
        share_NI = 0.5 * (1 + torch.erf(gate_NI / math.sqrt(2)))
        density_NI = torch.exp(-0.5 * gate_NI.square()) / math.sqrt(2 * math.pi)
        on_gate_NI = dy_NI * value_NI * (share_NI + gate_NI * density_NI)
        on_value_NI = dy_NI * gate_NI * share_NI
        dy_NI.copy_(value_NI * gate_NI * share_NI)
        wide_NJ.copy_(torch.cat([on_value_NI, on_gate_NI], dim=1))


_OPS = fast_ops.define(
    "finetune_diffusion",
    {
        "turn": "(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor",
        "turn_backward": "(Tensor dy, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor",
        "geglu": "(Tensor wide) -> Tensor",
        "geglu_backward_": "(Tensor(a!) dy, Tensor(b!) wide) -> ()",
    },
    Plain,
    "finetune.diffusion.triton_kernels",
    made={"geglu": lambda wide_NJ: wide_NJ.new_empty(wide_NJ.shape[0], wide_NJ.shape[1] // 2)},
)


def _rotated(x_BLHE: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
    one, two = x_BLHE[..., 0::2], x_BLHE[..., 1::2]
    cos, sin = cos_LE[:, None, 0::2], sin_LE[:, None, 0::2]
    return torch.stack([one * cos - two * sin, two * cos + one * sin], -1).flatten(-2)
