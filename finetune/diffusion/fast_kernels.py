"""The gated activation of UNets' transformer blocks and its gradient: one pass over memory each.

N tokens, I channels of the feed-forward layer, J twice as many: values, and behind them gates

Triton kernels on a GPU, torch's operations elsewhere. All compute in fp32 and round to the dtype of what they are
given. Tensors are contiguous.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from finetune.training import fast_ops


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
        "geglu": "(Tensor wide) -> Tensor",
        "geglu_backward_": "(Tensor(a!) dy, Tensor(b!) wide) -> ()",
    },
    Plain,
    "finetune.diffusion.triton_kernels",
    made={"geglu": lambda wide_NJ: wide_NJ.new_empty(wide_NJ.shape[0], wide_NJ.shape[1] // 2)},
)
