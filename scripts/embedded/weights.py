"""All trainable weights of a model as one vector, so that averaging, clipping and the optimiser are one kernel each.

W weights of the model, with gaps for alignment.
"""

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # weights: 128 bytes of bf16, enough for every vector load


class FlatWeights:
    """Moves the weights of a model into one fp32 vector `master_W`, and their gradients into another.

    With `dtype` bf16 the model itself computes on a bf16 copy: no casts at each use, half the memory traffic of fp32,
    while the optimiser still adds small steps to fp32 numbers.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.parameters: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
        self.starts: list[int] = []
        total = 0
        for weight in self.parameters:
            self.starts.append(total)
            total += -(-weight.numel() // ALIGNMENT) * ALIGNMENT
        # Each weight keeps its order in memory (channels last or first), so it must be whole in memory.
        self.strides = [weight.stride() for weight in self.parameters]
        self.master_W = nn.Parameter(torch.zeros(total, device=self.parameters[0].device))
        with torch.no_grad():
            torch._foreach_copy_(self.views(self.master_W.data), self.parameters)
        self.working_W = self.master_W.data if dtype == torch.float32 else self.master_W.data.to(dtype)
        self.gradients_W = torch.zeros_like(self.working_W)
        self.master_W.grad = self.gradients_W if dtype == torch.float32 else torch.zeros_like(self.master_W)
        pairs = zip(self.views(self.working_W), self.views(self.gradients_W), strict=True)
        for weight, (value, gradient) in zip(self.parameters, pairs, strict=True):
            weight.data = value
            weight.grad = gradient

    def views(self, vector_W: Tensor) -> list[Tensor]:
        """The vector's part for each weight, in the weight's shape."""
        return [
            vector_W[start:].as_strided(weight.shape, stride)
            for weight, start, stride in zip(self.parameters, self.starts, self.strides, strict=True)
        ]

    def collect_gradients(self) -> None:
        """Give the optimiser of `master_W` what backward passes left, in fp32."""
        assert self.master_W.grad is not None
        if self.master_W.grad is not self.gradients_W:
            self.master_W.grad.copy_(self.gradients_W)

    def publish(self) -> None:
        """Let the model compute with what the optimiser made of the weights."""
        if self.working_W.dtype != torch.float32:
            self.working_W.copy_(self.master_W.data)

    def release(self, values_W: Tensor) -> None:
        """Give every weight a memory of its own again, in fp32, with these values: a view cannot be saved alone."""
        for weight, value in zip(self.parameters, self.views(values_W), strict=True):
            weight.grad = None
            weight.data = value.clone()
