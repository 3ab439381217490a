"""A frozen linear layer and the LoRA adapter on it as few large kernels: what fast layers of all models are made of.

N rows, I and O input and output features, r rank

PEFT's modules stay and own the parameters; only what a layer computes is written anew.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.lora import ADAPTER
from finetune.config.schema import LoraConfig, LoraInit, ModelConfig, Quantize
from finetune.memory import checkpointing, quantize

COPIES = "fast_a", "fast_b", "fast_scaled_a", "fast_scaled_b"
"""Buffers of an adapted layer's frozen one: what PEFT saves stays as it is."""
DTYPES = (torch.bfloat16, torch.float32)  # fp16's gradients may overflow where autocast's don't


class Linear:
    """Products of a layer, and their gradients."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        """dtype: of the arithmetic."""
        self.layer, self.dtype, self.adapted = layer, dtype, hasattr(layer, "lora_A")
        self.frozen = layer.get_base_layer() if self.adapted else layer
        quantize.unnest(self.frozen)
        if self.adapted:
            self.scale = float(layer.scaling[ADAPTER])
            for name, weight in zip(COPIES, 2 * self.parameters(), strict=True):
                self.frozen.register_buffer(name, torch.empty_like(weight, dtype=dtype), persistent=False)

    def parameters(self) -> list[nn.Parameter]:
        """A (r, I) and B (O, r), or none."""
        return [self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight] if self.adapted else []

    def copies(self) -> list[Tensor]:
        """A, B, s A and s B in the dtype of the arithmetic, as they were when a pass began."""
        return [getattr(self.frozen, name) for name in COPIES]

    def product(self, x_NI: Tensor, onto_NO: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x W' + bias + s x A' B' (+ onto), and s x A' for the backward pass."""
        weight_IO, bias_O = quantize.dense(self.frozen, self.dtype).t(), self.frozen.bias
        if onto_NO is None:
            y_NO = x_NI @ weight_IO if bias_O is None else torch.addmm(bias_O.to(self.dtype), x_NI, weight_IO)
        else:
            y_NO = torch.addmm(onto_NO, x_NI, weight_IO)
            if bias_O is not None:
                y_NO.add_(bias_O)
        if not self.adapted:
            return y_NO, None
        _, b_Or, scaled_a_rI, _ = self.copies()
        xa_Nr = x_NI @ scaled_a_rI.t()
        return y_NO.addmm_(xa_Nr, b_Or.t()), xa_Nr

    def to_adapter(self, dy_NO: Tensor) -> Tensor | None:
        """s dy B, the gradient on x A', for `adapter_gradients`."""
        return dy_NO @ self.copies()[3] if self.adapted else None

    def input_gradient(self, dy_NO: Tensor, onto_NI: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The gradient on x, added to `onto` where there is one, and `to_adapter`."""
        weight_OI = quantize.dense(self.frozen, self.dtype)
        dx_NI = dy_NO @ weight_OI if onto_NI is None else onto_NI.addmm_(dy_NO, weight_OI)
        dxa_Nr = self.to_adapter(dy_NO)
        return (dx_NI, None) if dxa_Nr is None else (dx_NI.addmm_(dxa_Nr, self.copies()[0]), dxa_Nr)

    def adapter_gradients(
        self, dy_NO: Tensor, dxa_Nr: Tensor | None, x_NI: Tensor, xa_Nr: Tensor | None
    ) -> list[Tensor]:
        """Those on A and B, in fp32."""
        if dxa_Nr is None or xa_Nr is None:
            return []
        return [_fp32_product(dxa_Nr.t(), x_NI), _fp32_product(dy_NO.t(), xa_Nr)]


def apply(function: Any, *inputs: Any, adapters: Sequence[Linear]) -> Any:
    """What a `torch.autograd.Function` makes of its inputs and of all adapters, which get their gradients by it."""
    return function.apply(*inputs, *parameters(adapters))


def parameters(parts: Sequence[Linear]) -> list[Tensor]:
    """Of all adapters, in order."""
    return [parameter for part in parts for parameter in part.parameters()]


def is_off(block: Any) -> bool:
    """Whether the plain block computes: its adapters are off, all of them at once, or its weights come to the GPU for
    each pass. block: `fast.parts()` are its layers."""
    if getattr(block, checkpointing.SELF_CHECKPOINTING, False):
        return True
    return any(part.layer.disable_adapters for part in block.fast.parts() if part.adapted)


@torch.no_grad()
def renew(blocks: Sequence[Any]) -> None:
    """Copy the adapters of blocks as they are now. Before each pass: fused optimisers don't raise a parameter's
    version."""
    adapted = [part for block in blocks if not is_off(block) for part in block.fast.parts() if part.adapted]
    if not adapted:
        return
    copies = [part.copies() for part in adapted]
    plain, scaled = ([copy for of_part in copies for copy in of_part[part]] for part in (slice(2), slice(2, 4)))
    torch._foreach_copy_(plain, parameters(adapted))
    torch._foreach_copy_(scaled, plain)
    torch._foreach_mul_(scaled, [part.scale for part in adapted for _ in range(2)])


def reason_against(model: ModelConfig, lora: LoraConfig, dtype: torch.dtype) -> str:
    """Why the layers of a run stay as they are, naming the setting; empty where nothing of it is in the way."""
    if lora.dropout:
        return f"lora.dropout={lora.dropout:g}"
    if lora.dora:
        return "lora.dora=true"
    if lora.init is LoraInit.pissa:  # whose A is a difference to where it started
        return "lora.init=pissa"
    if model.quantize is Quantize.int8:
        return "model.quantize=int8"
    if model.offload:
        return "model.offload=true"
    return "" if dtype in DTYPES else "trainer.precision=fp16"


def _fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b, summed and left in fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype is torch.bfloat16 else a.float() @ b.float()
