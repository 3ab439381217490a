"""Cross entropy of a frozen output layer, without the logits of a whole batch.

N trained tokens, D hidden channels, V vocabulary entries, C tokens of one chunk

At V = 152k one token's logits take 0.6 MB in fp32, so a batch of 8192 needs 5 GB for them and as much again for their
gradient. Here both exist for one chunk of tokens at a time: the forward pass computes a chunk's loss together with its
gradient on the hidden states, keeps only the latter (N×D), and the backward pass multiplies that by one number.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 128 * 2**20
"""Size of one chunk's fp32 logits; two such buffers are alive at once, three with a softcap.

Smaller chunks read the weight more often: 660 tokens forward and backward at D = 512, V = 152k in fp32 took one core
of a CPU 5.2 s with 16 MiB, 3.2 s with 64, 2.9 s with 128 and 2.9 s with 256. Not measured on a GPU."""


@dataclass(frozen=True)
class Head:
    """The output layer of a language model: logits = cap(scale * (hidden @ weight.T + bias)).

    weight: (V, D).
    bias: (V,) or None.
    softcap: c of cap(x) = c * tanh(x / c) (arXiv 2408.00118, §2); None leaves x as it is.
    scale: Cohere's `logit_scale`, or 1 / Granite's `logits_scaling`; applied before the cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def to(self, device: torch.device) -> "Head":
        """The same on another device, detached."""
        bias = None if self.bias is None else self.bias.detach().to(device)
        return replace(self, weight=self.weight.detach().to(device), bias=bias)


def logits(head: Head, hidden_ND: Tensor) -> Tensor:
    """The logits of every token at once, (N, V) in fp32 (fp64 for a head in fp64), differentiable.

    The product is computed in autocast's dtype where that is on, else in the weight's; all that follows in fp32.
    """
    dtype = _product_dtype(head, hidden_ND.device.type)
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logits_NV = torch.nn.functional.linear(hidden_ND.to(dtype), head.weight.to(dtype), bias)
        logits_NV = logits_NV.to(torch.promote_types(dtype, torch.float32))
        if head.scale != 1:
            logits_NV = logits_NV * head.scale
        if head.softcap is not None:
            logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    return logits_NV


def summed_cross_entropy(hidden_ND: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """Sum of the N tokens' cross entropy in nats, a 0-dim tensor in fp32 (fp64 for a head in fp64).

    hidden_ND: states of the trained tokens alone, so that the others cost nothing; N may be 0. Any dtype.
    targets_N: int64, each from 0 to V - 1.

    The gradient of `hidden_ND` is computed at once unless gradients are off. A head that asks for a gradient as well
    (the rows of new tokens do) gets one; its logits are then made a second time in the backward pass. The product runs
    in the dtype that `logits` names, the softmax and the sum in fp32.

    One implementation serves every device; the others gain too little where the weight is frozen. 2048 tokens, D = 512,
    V = 32k, forward and backward, CPU seconds on one core, peak memory beyond the inputs:

        full logits                           fp32 2.4 s, 763 MiB    bf16 1.5 s, 752 MiB
        torch.nn.functional.linear_cross_entropy   3.3 s,  97 MiB         2.3 s, 158 MiB
        this, 128 MiB a chunk                      2.3 s, 280 MiB         1.3 s, 275 MiB
        this, 32 MiB a chunk                       2.1 s, 118 MiB         1.2 s, 101 MiB

    torch's function (2.13 on) also adds up in bf16 if the states are bf16 (29568 nats where 30258 were right), wants
    states and weight in one dtype, and knows neither softcap nor scale. Liger's kernel, which needs a GPU and was not
    timed, passes over a chunk fewer times, but knows no scale, shrinks the chunk to about N·D/V tokens, waits for the
    GPU in both passes and scales its gradient in place, so that a second backward pass is wrong.
    """
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (head.weight, head.bias)):
        return _recomputed(hidden_ND, head, targets_N)
    result: Tensor = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head, targets_N, hidden_ND.requires_grad and torch.is_grad_enabled()
    )
    return result


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head: Head, targets_N: Tensor, differentiate: bool) -> Tensor:
        device = hidden_ND.device.type
        dtype = _product_dtype(head, device)
        head = replace(head, weight=head.weight.to(dtype))  # once, and not in every chunk
        rows = _rows(head)
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        gradient_ND = torch.empty_like(hidden_ND) if differentiate else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden_ND), rows):
                chunk = slice(start, start + rows)
                gradient_CD = None if gradient_ND is None else gradient_ND[chunk]
                total += _chunk(head, hidden_ND[chunk], targets_N[chunk], gradient_CD)
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        # A 0-dim factor would be rounded to the gradient's dtype first: fp16 loss scales from 65536 up become infinite.
        # `out` spares a GPU the fp32 product.
        scaled_ND = torch.mul(gradient_ND, upstream.reshape(1, 1), out=torch.empty_like(gradient_ND))
        return scaled_ND, None, None, None


def _recomputed(hidden_ND: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    def loss(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits(head, hidden_CD), targets_C, reduction="sum")

    rows = _rows(head)
    total = hidden_ND.new_zeros((), dtype=torch.promote_types(head.weight.dtype, torch.float32))
    for start in range(0, len(hidden_ND), rows):
        hidden_CD, targets_C = hidden_ND[start : start + rows], targets_N[start : start + rows]
        total = total + checkpoint(loss, hidden_CD, targets_C, use_reentrant=False)
    return total


def _rows(head: Head) -> int:
    """Tokens in a chunk."""
    return max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))


def _chunk(head: Head, hidden_CD: Tensor, targets_C: Tensor, gradient_CD: Tensor | None) -> Tensor:
    """One chunk's summed loss; its gradient on the states is written to `gradient_CD`, if given."""
    logits_CV = logits(head, hidden_CD)
    logs_CV = torch.log_softmax(logits_CV, dim=-1)
    targets_C1 = targets_C[:, None]
    target_logs_C1 = logs_CV.gather(1, targets_C1)
    loss = -target_logs_C1.sum()
    if gradient_CD is None:
        return loss
    # Softmax minus one-hot; expm1 keeps the digits of p - 1 where p is close to 1.
    error_CV = logs_CV.exp_().scatter_(1, targets_C1, target_logs_C1.expm1())
    if head.softcap is not None:
        error_CV *= logits_CV.div_(head.softcap).square_().neg_().add_(1)  # 1 - tanh²
    del logits_CV  # as large as what is made next
    gradient_CD.copy_(error_CV.to(head.weight.dtype) @ head.weight * head.scale)
    return loss


def _product_dtype(head: Head, device: str) -> torch.dtype:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
