"""Frozen blocks in CPU memory: copied to the GPU ahead of their use, and never back.

All blocks share a small ring of buffers on the GPU. While one block computes, the next one is on its way on a stream
of its own: ahead in the forward pass, backwards in the backward pass. Between the two a block's weights are gone, so
every block is recomputed in backward. Adapters and all that is not in a block stay on the GPU.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.config.schema import ModelConfig
from finetune.memory import checkpointing
from finetune.run.progress import say

WEIGHTS_SHARE = 0.6  # of the GPU for weights where blocks are offloaded; the rest is for activations and adapters
RING_SLOTS = 2  # buffers in the ring: one computes, one fills; a third would only help where copies outlast some blocks
ALIGNMENT = 256  # bytes; what CUDA's allocator gives, and every dtype can be viewed at
SCALES = ("absmax", "code", "offset")  # tensors of bitsandbytes' QuantState, and of its `state2`


def is_active(model: ModelConfig, device: torch.device) -> bool:
    """Whether `model.offload` asks for it and there is a GPU whose memory it could save."""
    return model.offload and device.type == "cuda"


def warn_without_gpu(device: torch.device) -> None:
    """Say where `model.offload=true` is in vain. For a whole command, which may load the base a dozen times."""
    if device.type != "cuda":
        say("model.offload=true changes nothing without a CUDA GPU: every layer is in CPU memory anyway")


def offload_to_fit(model: nn.Module, device: torch.device, vram_gib: float) -> None:
    """Move a model from CPU memory to a GPU, but for the blocks that don't fit.

    vram_gib: memory of the GPU that may be used, GiB; 0 is what is free.
    """
    free = torch.cuda.mem_get_info(device)[0]
    ours = vram_gib * 2**30 - torch.cuda.memory_allocated(device)  # two models may have to be there at once
    away, _ = offloaded_blocks(model, min(ours, free) if vram_gib else free)
    stream(model, away, device)


def offloaded_blocks(model: nn.Module, gpu: float) -> tuple[list[nn.Module], int]:
    """The blocks that wait in CPU memory, and bytes of the ring that they come to. gpu: bytes of it."""
    room = WEIGHTS_SHARE * gpu
    blocks = find(model)
    sizes = [frozen_bytes(block) for block in blocks]
    room -= weight_bytes(model) - sum(sizes)
    if sum(sizes) <= room:
        return [], 0
    ring = RING_SLOTS * max(sizes, default=0)
    room -= ring
    kept = next((count for count in range(len(blocks), 0, -1) if sum(sorted(sizes)[-count:]) <= room), 0)
    # Those that stay on the GPU are spread evenly: while they compute, the next one away has more time to arrive.
    away = len(blocks) - kept
    return [blocks[index * len(blocks) // away] for index in range(away)], ring


def planned_bytes(model: nn.Module, gpu: float) -> dict[str, float]:
    """For memory plans: bytes that `offload_to_fit` takes from the weights on a GPU of `gpu` bytes, and its ring's."""
    away, ring = offloaded_blocks(model, gpu)
    return {"weights": -float(sum(map(frozen_bytes, away))), "ring of blocks": float(ring)}


def stream(model: Any, away: Sequence[nn.Module], device: torch.device) -> None:
    """Keep the frozen weights of the blocks `away` in CPU memory, and all else of the model on `device`."""
    whole = weight_bytes(model)
    blocks = [_Block(block) for block in away]
    for block, memory in zip(blocks, _memory([block.size for block in blocks], device.type == "cuda"), strict=True):
        block.move_to_cpu(memory)
    ring = Ring(blocks, device)
    offloaded = {id(parameter) for block in ring.blocks for _, _, parameter in block.places}
    for module in model.modules():  # adapters are modules of their own
        if not any(id(parameter) in offloaded for parameter in module.parameters(recurse=False)):
            module._apply(lambda tensor: tensor.to(device), recurse=False)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for block in ring.blocks:
        _wrap(block, ring)
    names = [name for name, module in model.named_modules() if module in set(away)]
    if names:  # tells Accelerate to leave it so
        model.hf_device_map = {"": device} | dict.fromkeys(names, "cpu")
    held = sum(block.flat.nbytes for block in ring.blocks) / 2**30
    say(f"model.offload: {held:.1f} of {whole / 2**30:.1f} GiB of weights stay in CPU memory")


def find(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model that repeat: a transformer's layers, a UNet's transformer and residual blocks.

    They are what lies in lists below the modules that can recompute, as diffusers and transformers build their models.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[nn.Module, None] = {}
    for guard in checkpointing.checkpointable(model):
        for part in guard.children():
            for block in part if isinstance(part, nn.ModuleList) else ():
                if isinstance(block, GradientCheckpointingLayer) or not checkpointing.checkpointable(block):
                    found[block] = None
    inner = {module for block in found for module in block.modules() if module is not block}
    return [block for block in found if block not in inner]


class _Block:
    """A block's frozen weights: `flat`, one tensor of `size` bytes in CPU memory, of which its parameters are views.

    places: the modules with the names of their parameters, and those parameters.
    """

    flat: Tensor

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.places = [
            (part, name, parameter)
            for part in module.modules()
            for name, parameter in part.named_parameters(recurse=False)
            if not parameter.requires_grad
        ]
        self.offsets, self.size = [], 0
        for tensor in self._now():
            self.offsets.append(self.size)
            self.size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

    def move_to_cpu(self, memory: Tensor) -> None:
        """Copy the weights to CPU memory, which is their place from now on."""
        self.flat = memory
        tensors = self._now()
        views = self._views(memory, tensors)
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor)
        remaining = iter(views)
        for _, _, parameter in self.places:
            _set_tensors(parameter, remaining)

    def resident(self, buffer: Tensor) -> list[nn.Parameter]:
        """The parameters as they are when the block lies in `buffer`: views of it, for good."""
        views = iter(self._views(buffer, self._now()))
        made = []
        for _, _, parameter in self.places:
            twin = copy.copy(parameter)  # of 4 bits: with a state of its own
            state = getattr(parameter, "quant_state", None)
            if state is None:
                twin = nn.Parameter(parameter.detach(), requires_grad=False)
            else:
                twin.quant_state = copy.copy(state)  # type: ignore[attr-defined]
                twin.quant_state.state2 = copy.copy(state.state2)  # type: ignore[attr-defined]
            _set_tensors(twin, views)
            made.append(twin)
        return made

    def _now(self) -> list[Tensor]:
        return [tensor for _, _, parameter in self.places for tensor in _tensors(parameter)]

    def _views(self, flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for offset, tensor in zip(self.offsets, tensors, strict=True)
        ]


@dataclass
class _Slot:
    """A buffer of the ring. holds: whose weights are in it, or on their way until `ready`."""

    buffer: Tensor
    ready: Any
    holds: _Block | None = None


class Ring:
    """The buffers, and which block is in which.

    A block always lies in the same buffer: 4-bit products keep the addresses of their weights from forward to backward.
    The order of the blocks is the one in which the first pass meets them.
    """

    def __init__(self, blocks: Sequence[_Block], device: torch.device, slots: int = RING_SLOTS) -> None:
        self.blocks = list(blocks)
        size = max((block.flat.numel() for block in blocks), default=0)
        cuda: Any = torch.cuda if device.type == "cuda" else None
        self.device, self.stream = device, cuda and cuda.Stream(device)
        self.slots = [
            _Slot(torch.empty(size, dtype=torch.uint8, device=device), cuda and cuda.Event())
            for _ in range(min(slots, len(self.blocks)))
        ]
        self.order: dict[_Block, int] = {}
        self.twins: dict[_Block, list[nn.Parameter]] = {}
        self.backwards = False

    @contextmanager
    def holding(self, block: _Block) -> Iterator[None]:
        """The block's weights are on the device inside; the next block's are under way."""
        slot = self._slot(block)
        if slot.holds is not block:
            self.fetch(block, slot)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        following = self._next(block)
        if following is not None and (target := self._slot(following)) is not slot and target.holds is not following:
            self.fetch(following, target)
        if block not in self.twins:
            self.twins[block] = block.resident(slot.buffer)
        try:
            for (part, name, _), twin in zip(block.places, self.twins[block], strict=True):
                part._parameters[name] = twin
            yield
        finally:
            for part, name, parameter in block.places:
                part._parameters[name] = parameter

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Blocks are needed in reverse order inside."""
        self.backwards = True
        try:
            yield
        finally:
            self.backwards = False

    def fetch(self, block: _Block, slot: _Slot) -> None:
        """Copy a block to its slot as soon as everything that was queued so far is done with what lies there."""
        target = slot.buffer[: block.flat.numel()]
        slot.holds = block
        if self.stream is None:
            target.copy_(block.flat)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(block.flat, non_blocking=True)
            slot.ready.record(self.stream)

    def _slot(self, block: _Block) -> _Slot:
        return self.slots[self.order.setdefault(block, len(self.order)) % len(self.slots)]

    def _next(self, block: _Block) -> _Block | None:
        """Which block follows, as far as is known: after a forward pass with gradients comes the backward pass."""
        order, number = list(self.order), self.order[block]
        if self.backwards:
            return order[number - 1] if number else None
        if number + 1 < len(order):
            return order[number + 1]
        again = len(order) == len(self.blocks) and not torch.is_grad_enabled()
        return order[0] if again else None


def _memory(sizes: Sequence[int], pin: bool) -> Iterator[Tensor]:
    """CPU memory of so many bytes each. Pinned memory comes in powers of two, so blocks share pieces of such sizes."""
    left, piece = sum(sizes), torch.empty(0, dtype=torch.uint8)
    for size in sizes:
        if size > piece.numel():
            below_left, above_size = 1 << (left.bit_length() - 1), 1 << (size - 1).bit_length()
            piece = torch.empty(max(below_left, above_size), dtype=torch.uint8, pin_memory=pin)
        yield piece[:size]
        piece, left = piece[size:], left - size


def _wrap(block: _Block, ring: Ring) -> None:
    """Have a block compute with its weights in the ring, and be recomputed in backward.

    By the time that backward reaches a block, it has queued all of the blocks behind it (autograd goes strictly by the
    order of the forward pass), so their buffers may be filled again.
    """
    module: Any = block.module
    forward: Callable[..., Any] = module.forward

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), ring.recomputing()

    @wraps(forward)
    def streamed(*args: Any, **kwargs: Any) -> Any:
        def held(*inputs: Any) -> Any:
            with ring.holding(block):
                return forward(*inputs[: len(args)], **dict(zip(kwargs, inputs[len(args) :], strict=True)))

        inputs = (*args, *kwargs.values())
        if not torch.is_grad_enabled():
            return held(*inputs)
        # Without names: by its unnamed inputs alone torch knows on which GPU dropout must draw the same again.
        return checkpoint(held, *inputs, use_reentrant=False, context_fn=contexts)

    module.forward = streamed
    setattr(module, checkpointing.SELF_CHECKPOINTING, True)


def _tensors(parameter: Any) -> list[Tensor]:
    """A parameter's data and, of 4 bits, the tensors that scale it."""
    found = [parameter.data]
    state = getattr(parameter, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):
        found += [tensor for name in SCALES if (tensor := getattr(part, name, None)) is not None]
    return found


def _set_tensors(parameter: Any, tensors: Iterator[Tensor]) -> None:
    """The counterpart of `_tensors`."""
    parameter.data = next(tensors)
    state = getattr(parameter, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):
        for name in SCALES:
            if getattr(part, name, None) is not None:
                setattr(part, name, next(tensors))


def weight_bytes(module: nn.Module) -> int:
    """Of all its parameters, as they are stored."""
    return sum(parameter.nbytes for parameter in module.parameters())


def frozen_bytes(module: nn.Module) -> int:
    """Of those that aren't trained."""
    return sum(parameter.nbytes for parameter in module.parameters() if not parameter.requires_grad)
