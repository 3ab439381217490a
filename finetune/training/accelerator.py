"""The one place that builds Accelerate's Accelerator."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from finetune.config import Precision


def build_accelerator(precision: Precision, device: torch.device) -> Accelerator:
    """An Accelerator for `precision` (not `auto`) on `device`.

    Accelerate keeps its settings in global state: it is reset here, so that a second run in the same process gets
    its own.
    """
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    mixed = "no" if precision is Precision.fp32 else precision.name
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")
