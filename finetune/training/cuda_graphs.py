"""Forward and backward pass of a model as CUDA graphs: the GPU launches their kernels by itself, the host two of them.

A small batch through a UNet is thousands of short kernels, and the GPU waits for the host to launch them. Nothing here
knows which model it is. What is captured must not wait for the host, and must be the same at each call but for the
values of its inputs and of the trained parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WARM_UP = 3  # passes before a capture, in which libraries choose their kernels (torch's own number)
MOST = 32  # shapes that are captured; each keeps its inputs and gradients


class CudaGraphs:
    """A function of tensors whose passes are replayed, from the third call with the same shapes on.

    The graphs share their memory, which nothing else can use: a shape is captured only where that leaves as much again.
    """

    def __init__(self, function: Callable[..., Tensor], parameters: Sequence[nn.Parameter], limit: float) -> None:
        """function: of tensors by name. parameters: what gets gradients. limit: bytes that this process may take."""
        self.function, self.parameters, self.limit = function, list(parameters), limit
        self.graphs: dict[Any, _Graph] = {}
        self.seen: set[Any] = set()
        self.pool: Any = None
        self.closed = False

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the function makes of them."""
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        if key not in self.graphs:
            if self.closed or key not in self.seen or len(self.graphs) >= MOST or not self._has_room():
                self.seen.add(key)
                return self.function(**tensors)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.graphs[key] = _Graph(self.function, tensors, self.parameters, self.pool)
        found: Tensor = _Replay.apply(self.graphs[key], tensors, *self.parameters)  # type: ignore[no-untyped-call]
        return found

    def close(self) -> bool:
        """Give the memory back, and capture nothing any more. False if that was so already."""
        changed, self.closed = not self.closed, True
        self.graphs.clear()
        self.pool = None
        return changed

    def _has_room(self) -> bool:
        """Whether what passes take can be kept, and be there once more for validation and previews."""
        resident = torch.cuda.memory_allocated()
        return resident + 2 * (torch.cuda.max_memory_allocated() - resident) <= self.limit


class _Graph:
    """The two passes for inputs of one shape, with the memory that they read and write."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        tensors: Mapping[str, Tensor],
        parameters: Sequence[nn.Parameter],
        pool: Any,
    ) -> None:
        self.inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                output = function(**self.inputs)
                torch.autograd.grad(output, parameters, torch.zeros_like(output), allow_unused=True)
                del output
        torch.cuda.current_stream().wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=pool):
            output = function(**self.inputs)
        self.upstream = torch.zeros_like(output)
        with torch.cuda.graph(self.backward, pool=pool):
            self.gradients = torch.autograd.grad(output, parameters, self.upstream, allow_unused=True)
        self.output = output.detach()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, tensors: Mapping[str, Tensor], *_: nn.Parameter) -> Tensor:
        for name, place in graph.inputs.items():
            place.copy_(tensors[name])
        graph.forward.replay()
        ctx.graph = graph
        return graph.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        graph: _Graph = ctx.graph
        graph.upstream.copy_(upstream)
        graph.backward.replay()
        # Copies: autograd keeps what it is given as a parameter's gradient, and the next replay writes over these.
        made = [gradient for gradient in graph.gradients if gradient is not None]
        copies = [torch.empty_like(gradient) for gradient in made]
        torch._foreach_copy_(copies, made)
        following = iter(copies)
        return None, None, *(None if gradient is None else next(following) for gradient in graph.gradients)
