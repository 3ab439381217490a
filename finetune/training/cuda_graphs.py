"""Forward and backward pass as CUDA graphs: the GPU launches their kernels by itself, the host only two replays.

A small batch through a UNet is thousands of short kernels, and the GPU waits for the host to launch them. Nothing here
knows which model it is. What is captured must not wait for the host, must be the same at each call but for the values
of its inputs and of the trained parameters, and must find all of these at the same addresses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.errors import is_out_of_memory
from finetune.run.plain import first_line
from finetune.run.progress import say

MOST = 32  # shapes that are captured; each keeps its inputs and gradients
SLACK = 2**29  # bytes that a capture may take beyond the passes themselves: workspaces, what allocators round up


class CudaGraphs:
    """A function of tensors whose passes are replayed, from the second call with the same shapes on.

    The graphs share their memory, which nothing else can use meanwhile: `make_room` gives it back. They add up
    gradients in buffers of their own, which become the parameters' `.grad`: with a thousand parameters, autograd would
    keep the host busy for longer than a small step takes.
    """

    def __init__(self, function: Callable[..., Tensor], parameters: Sequence[nn.Parameter], limit: float) -> None:
        """function: of tensors by name. parameters: what gets gradients. limit: bytes that this process may take."""
        self.function, self.parameters, self.limit = function, list(parameters), limit
        self.graphs: dict[Any, _Graph] = {}
        self.seen: set[Any] = set()
        self.sums: dict[int, Tensor] = {}
        self.pool: Any = None
        self.stream: Any = None

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the function makes of them."""
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        if key not in self.graphs and not self._captured(key, tensors):
            self.make_room()
            return self.function(**tensors)
        graph = self.graphs[key]
        found: Tensor = _Replay.apply(graph, tensors, graph.anchor)  # type: ignore[no-untyped-call]
        return found

    def make_room(self) -> None:
        """Forget the graphs if anything else, as large as what was met so far, finds no room beside them."""
        if not self.graphs:
            return
        torch.cuda.empty_cache()
        if torch.cuda.memory_reserved() + _largest() > self.limit:
            self.graphs.clear()
            self.pool = None
            torch.cuda.empty_cache()

    def _captured(self, key: Any, tensors: Mapping[str, Tensor]) -> bool:
        """Make the graph of these shapes, if they were met before and it finds room."""
        if key not in self.seen or len(self.graphs) >= MOST or not self._fits():
            self.seen.add(key)
            return False
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        cuda: Any = torch.cuda  # half-typed
        self.stream = self.stream or cuda.Stream()
        random = torch.cuda.get_rng_state()
        try:
            self.graphs[key] = _Graph(self.function, tensors, self.parameters, self.sums, self.pool, self.stream)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            say(f"train: a step can't be a CUDA graph here ({first_line(error)}); training goes on without")
            self.limit = 0.0
            return False
        finally:
            torch.cuda.set_rng_state(random)  # dropout draws what it would draw without a capture
        return True

    def _fits(self) -> bool:
        return torch.cuda.memory_allocated() + _largest() + SLACK <= self.limit


def _largest() -> int:
    """Bytes of the largest work so far, above what lies on the GPU all the time."""
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


class _Graph:
    """The two passes for inputs of one shape, with the memory that they read and write.

    sums: where all graphs add up the gradients of a parameter, by its number; those still missing are made. anchor:
    asks for a gradient in place of the parameters.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        tensors: Mapping[str, Tensor],
        parameters: Sequence[nn.Parameter],
        sums: dict[int, Tensor],
        pool: Any,
        stream: Any,
    ) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        self.inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside: libraries get their handles and workspaces for this stream
            output = function(**self.inputs)
            with _as_backward(parameters):
                found = torch.autograd.grad(output, parameters, torch.zeros_like(output), allow_unused=True)
            trained = [index for index, gradient in enumerate(found) if gradient is not None]
            del output, found
        torch.cuda.current_stream().wait_stream(stream)
        for index in trained:
            if index not in sums:
                sums[index] = torch.zeros_like(parameters[index])
        self.sums = [(parameters[index], sums[index]) for index in trained]
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=pool, stream=stream):
            output = function(**self.inputs)
        self.upstream = torch.zeros_like(output)
        with torch.cuda.graph(self.backward, pool=pool, stream=stream), _as_backward(parameters):
            gradients = torch.autograd.grad(output, [parameter for parameter, _ in self.sums], self.upstream)
            torch._foreach_add_([total for _, total in self.sums], list(gradients))
            del gradients
        self.output = output.detach()

    def take_over(self) -> None:
        """Let each parameter's `.grad` be its sum: what it holds already, or zero."""
        empty = []
        for parameter, total in self.sums:
            if parameter.grad is total:
                continue
            if parameter.grad is None:
                empty.append(total)
            else:
                total.copy_(parameter.grad)  # of a batch that was not replayed
            parameter.grad = total
        if empty:
            torch._foreach_zero_(empty)


def _as_backward(parameters: Sequence[nn.Parameter]) -> torch.autocast:
    """A loss is computed in autocast, its backward pass outside: a function's own would get other dtypes in it."""
    return torch.autocast(parameters[0].device.type, enabled=False)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, tensors: Mapping[str, Tensor], _: Tensor) -> Tensor:
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
        graph.take_over()
        graph.backward.replay()
        return None, None, None
