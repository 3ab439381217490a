"""How much memory a step takes and how much work it is, read off a machine that has no GPU and no weights.

A module's tensors become fakes, which have a shape and a dtype and nothing in them. Forward and backward then run as
they would, and each operation that reaches torch's dispatcher is noted: the bytes alive at that moment (of distinct
storages, as the allocator rounds them), the arithmetic, and the bytes it moves. Fakes live on the CPU device, because
a torch without CUDA can't index fake CUDA tensors; what CUDA does otherwise, `_like_cuda` does here too.

Nothing here knows diffusers, transformers or peft.
"""

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune import hub
from finetune.errors import ModelError
from finetune.memory.device import allocated_bytes
from finetune.planning.shape_cache import CPU, Shapes

UNTRACEABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
T = TypeVar("T")
U = TypeVar("U")
# CUDA autocast runs these in fp32 and the CPU's doesn't (torch, "Autocast Op Reference").
FP32_ON_CUDA = ("group_norm", "layer_norm", "rms_norm", "softmax")


@dataclass(frozen=True)
class Kernel:
    """One operation: bytes alive once its results exist, those of them that the loss made, arithmetic, bytes moved.

    count: of operations, where one stands for a stretch of them.
    """

    name: str
    live: float
    of_loss: float
    flops: float
    moved: float
    count: float = 1


@dataclass(frozen=True)
class Trace:
    """One run of a module. held: bytes that were there before, by name ("weights", …); kernels in the order of launch.

    `live` of a kernel counts what is held as well. away: bytes that waited in CPU memory from forward to backward.
    """

    held: Mapping[str, float]
    kernels: tuple[Kernel, ...]
    away: float = 0.0

    @property
    def peak(self) -> Kernel:
        """The kernel at which most bytes are alive."""
        return max(self.kernels, key=lambda kernel: kernel.live)

    @property
    def flops(self) -> float:
        """Arithmetic of all kernels."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def launches(self) -> float:
        """How many kernels there are."""
        return sum(kernel.count for kernel in self.kernels)


@dataclass(frozen=True)
class PhaseOption:
    """One way to do something. words: what sets it apart from those that take more. trace: None if it needs no GPU.

    runs: how often it is done in a whole run, None where nobody knows. timed: what is then run, if not `trace`, which
    shows the worst moment. moved: bytes that are read from disk, or written, besides.
    """

    trace: Trace | None
    words: str = ""
    runs: float | None = None
    timed: Trace | None = None
    moved: float = 0.0


class Tracer:
    """Makes fakes of modules and runs them. dtype: of autocast; fp32 is none. like_cuda: imitate a GPU's autocast."""

    def __init__(self, dtype: torch.dtype, *, like_cuda: bool) -> None:
        self.dtype, self.like_cuda = dtype, like_cuda
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.shapes = Shapes(self.mode)

    def fakify(self, module: nn.Module) -> nn.Module:
        """The same module with fakes in place of its tensors; what was shared stays shared."""
        made: dict[int, Tensor] = {}
        with self.mode:
            for part in module.modules():
                for tensors in (part._parameters, part._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            tensors[name] = made.setdefault(id(tensor), _fake(tensor))  # type: ignore[assignment]
        return module

    def step(
        self,
        model: nn.Module,
        inputs: Callable[[], T],
        forward: Callable[[T], U],
        loss: Callable[[U, T], Tensor],
        *,
        held: Mapping[str, float] | None = None,
        away: float = math.inf,
    ) -> Trace:
        """A later micro-batch of a step: gradients of earlier ones are there already.

        `loss` is a function of its own, so that what it allocates can be told apart. held: further bytes that are there
        all the time, by name. away: of how many bytes on a tensor that backward needs waits in
        CPU memory.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with self._running(model, held) as meter:
            before = meter.live
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            meter.held["gradients"] = meter.live - before
            meter.kernels.clear()
            meter.worth = away
            hooks = torch.autograd.graph.saved_tensors_hooks(meter.send_away, meter.bring_back)
            with self.autocast(), hooks if away < math.inf else nullcontext():
                batch = inputs()
                output = forward(batch)
                meter.in_loss = True
                total = loss(output, batch)
                meter.in_loss = False
            del batch, output  # the loop holds neither
            torch.autograd.backward(total)
        for parameter in trained:
            parameter.grad = None
        return meter.trace()

    def run(self, model: nn.Module, work: Callable[[], Any], *, held: Mapping[str, float] | None = None) -> Trace:
        """`work` without gradients, outside autocast; `model` and what is `held` are there before."""
        with torch.no_grad(), self._running(model, held) as meter:
            work()
        return meter.trace()

    def shape(self, work: Callable[[], Tensor]) -> torch.Size:
        """The shape of what `work` gives, without a trace."""
        with _failures_named(), torch.no_grad(), self.mode:
            return work().shape

    def autocast(self) -> torch.autocast:
        """The arithmetic of training."""
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not torch.float32)

    @contextmanager
    def _running(self, model: nn.Module, held: Mapping[str, float] | None) -> "Iterator[_Meter]":
        meter = _Meter(self.shapes)
        collecting = gc.isenabled()
        gc.disable()  # nothing here waits for it, and it would look through every object of the graph again and again
        try:
            with _failures_named(), self.mode, meter, _like_cuda() if self.like_cuda else nullcontext():
                meter.hold("adapters", (parameter for parameter in model.parameters() if parameter.requires_grad))
                meter.hold("weights", [*model.parameters(), *model.buffers()])
                for name, size in (held or {}).items():
                    meter.held[name] = meter.held.get(name, 0.0) + size
                    meter.live += size
                yield meter
        finally:
            if collecting:
                gc.enable()


@contextmanager
def _failures_named() -> Iterator[None]:
    """Whatever a base raises without its numbers, as a ModelError."""
    with hub.explained(lambda reason: f"this base can't be planned ({reason}); its configuration may be damaged"):
        try:
            yield
        except UNTRACEABLE as error:
            raise ModelError(
                f"this base can't be planned: it goes by its numbers, which a plan doesn't have ({error}); "
                "train tries its worst step all the same"
            ) from error


def extrapolated(one: Trace, two: Trace, micro_batches: tuple[int, int], wanted: int) -> Trace:
    """The trace of another micro-batch, from those of two.

    A kernel's figures are linear in the micro-batch, so each is drawn on from its own two. Where the two runs launch
    other kernels (a loss in more chunks), that stretch becomes one kernel of the most bytes and all the work.
    """
    first, second = list(one.kernels), list(two.kernels)
    if len(first) != len(second):
        first, second = _aligned(first, second)
    share = (wanted - micro_batches[0]) / (micro_batches[1] - micro_batches[0])

    def at(a: float, b: float) -> float:
        return a + share * (b - a)

    kernels = tuple(
        Kernel(
            a.name,
            at(a.live, b.live),
            at(a.of_loss, b.of_loss),
            at(a.flops, b.flops),
            at(a.moved, b.moved),
            at(a.count, b.count),
        )
        for a, b in zip(first, second, strict=True)
    )
    return Trace(one.held, kernels, at(one.away, two.away))


def _fake(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _aligned(first: list[Kernel], second: list[Kernel]) -> tuple[list[Kernel], list[Kernel]]:
    shorter = min(len(first), len(second))
    head = next((i for i in range(shorter) if first[i].name != second[i].name), shorter)
    room = shorter - head
    tail = next((i for i in range(room) if first[-1 - i].name != second[-1 - i].name), room)
    cut = [[*run[:head], *_joined(run[head : len(run) - tail]), *run[len(run) - tail :]] for run in (first, second)]
    if len(cut[0]) != len(cut[1]):  # one of them has nothing in between: no work, and what was alive just before
        shorter_cut = min(cut, key=len)
        before = shorter_cut[max(0, head - 1)]
        shorter_cut.insert(head, Kernel("", before.live, before.of_loss, 0.0, 0.0, 0))
    return cut[0], cut[1]


def _joined(kernels: list[Kernel]) -> list[Kernel]:
    if not kernels:
        return []
    peak = max(kernels, key=lambda kernel: kernel.live)
    flops, moved = sum(kernel.flops for kernel in kernels), sum(kernel.moved for kernel in kernels)
    return [Kernel("", peak.live, peak.of_loss, flops, moved, len(kernels))]


@contextmanager
def _like_cuda() -> Iterator[None]:
    """Norms and dropout as CUDA computes them, in blocks that are computed again in the backward pass as well.

    Functions are replaced: a `TorchFunctionMode` is off inside `backward`.
    """
    functional: Any = nn.functional
    own = {name: getattr(functional, name) for name in (*FP32_ON_CUDA, "dropout")}
    try:
        for name in FP32_ON_CUDA:
            setattr(functional, name, _in_fp32(own[name]))
        functional.dropout = _dropout
        yield
    finally:
        for name, function in own.items():
            setattr(functional, name, function)


def _in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(value.float() if _is_half(value) else value for value in args)
            kwargs = {name: value.float() if _is_half(value) else value for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return run


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    """The CPU keeps a mask of the input's dtype, a GPU one byte a number."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes = shapes
        self.live, self.loss_live, self.in_loss = 0.0, 0.0, False
        self.sizes: dict[int, tuple[float, bool]] = {}
        self.held: dict[str, float] = {}
        self.resident: set[int] = set()
        self.away, self.worth = 0.0, math.inf
        self.kernels: list[Kernel] = []
        self.costs: dict[Any, tuple[str, float, float]] = {}  # of a kernel, as in `Kernel`

    def hold(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already, under a name."""
        before = self.live
        for tensor in tensors:
            self._note(tensor)
            self.resident.add(tensor.untyped_storage()._cdata)
        self.held[name] = self.held.get(name, 0.0) + self.live - before

    def trace(self) -> Trace:
        return Trace(self.held, tuple(self.kernels), self.away)

    def send_away(self, tensor: Tensor) -> Tensor:
        """What autograd saves, as it waits elsewhere; weights and small tensors stay."""
        if tensor.nbytes < self.worth or tensor.untyped_storage()._cdata in self.resident:
            return tensor
        gone = torch.empty_like(tensor)
        self.kernels.pop()
        key = gone.untyped_storage()._cdata
        size, of_loss = self.sizes[key]
        self.live -= size
        self.loss_live -= size * of_loss
        self.sizes[key] = 0.0, of_loss
        self.away += tensor.nbytes
        return gone

    def bring_back(self, gone: Tensor) -> Tensor:
        """The counterpart; what stayed is itself."""
        return torch.empty_like(gone) if self.sizes.get(gone.untyped_storage()._cdata, (1.0,))[0] == 0 else gone

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:  # two thirds of all calls; the modes below would take a while
            return CPU
        result, key = self.shapes.run(function, args, kwargs or {})
        if function.is_view:
            return result
        made = [result] if isinstance(result, Tensor) else [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if new := [self._note(tensor) for tensor in made]:
            if not any(new) and not function._schema.is_mutable:  # another name for the same bytes
                return result
            if (cost := self.costs.get(key)) is None:
                moved = sum(tensor.nbytes for tensor in made)
                moved += sum(value.nbytes for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
                cost = self.costs[key] = str(function), _flops(function, args, kwargs or {}, result), moved
            self.kernels.append(Kernel(cost[0], self.live, self.loss_live, *cost[1:]))
        return result

    def _note(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return False
        size = allocated_bytes(storage.nbytes())
        self.sizes[key] = size, self.in_loss
        self.live += size
        self.loss_live += size * self.in_loss
        weakref.finalize(storage, self._forget, key)
        return True

    def _forget(self, key: int) -> None:
        size, of_loss = self.sizes.pop(key)
        self.live -= size
        self.loss_live -= size * of_loss


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> float:
    packet, flops = function._overloadpacket, cast(Any, flop_counter)
    if packet is torch.ops.aten.addmm_:  # which torch counts as nothing
        packet = torch.ops.aten.addmm
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return float(flops.sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return float(flops.sdpa_backward_flop_count(*(value.shape for value in args[:4])))
    count = flops.flop_registry.get(packet)
    return float(count(*args, **kwargs, out_val=result)) if count else 0.0
