"""The one place that builds Accelerate's Accelerator."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, AutocastKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from finetune.config.schema import Precision
from finetune.run import ranks
from finetune.training import distributed
from finetune.training.reduction import broadcast_start


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Inside, flash attention takes the place of cuDNN's, for the whole process; afterwards it is as it was."""
    # Its backward pass gives NaN for some shapes in 16 bit on Hopper GPUs, where torch prefers it: for those of
    # FLUX.1 (tests/gpu/test_training.py), and see github.com/pytorch/pytorch/issues/196678. It was twice as fast on an
    # H200 (1.7 ms against 3.2, forward and backward at 1024 px).
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def build_accelerator(precision: Precision, device: torch.device) -> Accelerator:
    """An Accelerator for `precision` (not `auto`) on `device`.

    Accelerate keeps its settings in global state: it is reset here, so that a second run in the same process gets
    its own.
    """
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    mixed = "no" if precision is Precision.fp32 else precision.name
    # The other processes are inside a reduction while the first one validates, draws or saves.
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=distributed.TIMEOUT_S))
    # Each weight is cast once a pass anyway, and a copy that outlives the pass is not there when a CUDA graph reads it.
    uncached = AutocastKwargs(cache_enabled=False)
    with ranks.alone_if_single():
        return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu", kwargs_handlers=[patience, uncached])


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, Any]:  # Accelerate's optimiser, half-typed
    """Model and optimiser under the accelerator's precision, with the same adapters in every process."""
    prepared = accelerator.prepare_model(model, evaluation_mode=True)  # else wrapped in DDP: the loop sums gradients
    broadcast_start([parameter for group in optimizer.param_groups for parameter in group["params"]])
    return prepared, accelerator.prepare(optimizer)
