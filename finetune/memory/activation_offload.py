"""Where autograd keeps what backward needs: on the device, or in CPU memory until then."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from finetune.run.progress import say

WORTH_BYTES = 2**16  # smaller tensors save too little for a copy


class ActivationOffload:
    """What a loss is computed in. away: in CPU memory (`trainer.offload_activations`); may be switched at any step."""

    def __init__(self, model: nn.Module, device: torch.device, enabled: bool) -> None:
        """device: of the model; without a GPU everything is in CPU memory already."""
        if enabled and device.type != "cuda":
            say("trainer.offload_activations=true changes nothing without a CUDA GPU: all is in CPU memory anyway")
        self.model, self.enabled = model, enabled and device.type == "cuda"

    def __call__(self) -> AbstractContextManager[None]:
        return _away(self.model) if self.enabled else nullcontext()


def _away(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, what autograd saves for backward goes to CPU memory until then; the model's own weights stay.

    Of a checkpointed block that is its inputs. The copies keep the order of the device's work, so none of them waits.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        if tensor.nbytes < WORTH_BYTES or tensor.untyped_storage().data_ptr() in own:
            return lambda: tensor
        gpu = tensor.device.type == "cuda"
        away = torch.empty_like(tensor, device="cpu", pin_memory=gpu).copy_(tensor, non_blocking=gpu)
        return partial(_back, away, tensor.device, tensor.stride())

    hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(pack, lambda back: back())
    return hooks


def _back(away: Tensor, device: torch.device, stride: tuple[int, ...]) -> Tensor:
    """A tensor on its device again, laid out as it was: sums over another layout round otherwise."""
    tensor = away.to(device, non_blocking=True)
    if tensor.stride() == stride or 0 in stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=device).copy_(tensor)
