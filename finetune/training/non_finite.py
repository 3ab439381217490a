"""A step whose loss or gradient is not finite: it leaves the weights alone, and what is said of it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from finetune.training import distributed

NAMED = 3  # examples of a step in a message; the rest is counted


def step_unless(optimizer: Any, accelerator: Accelerator, loss: Tensor, norm: Tensor) -> tuple[float, float]:
    """Take an optimiser step unless one of the two is not finite; both as numbers.

    optimizer: prepared by `accelerator`. Where it can, the device decides, so that the step is on its way before the
    host waits for the numbers.
    """
    if accelerator.scaler is not None:  # it must see a bad step to lower its scale, and decides by itself
        optimizer.step()
        return float(loss), float(norm)
    inner = optimizer.optimizer
    if inner.defaults.get("fused"):
        inner.found_inf = (~(loss.isfinite() & norm.isfinite())).to(norm.device, torch.float32)
        optimizer.step()
        return float(loss), float(norm)
    numbers = float(loss), float(norm)
    if all(map(math.isfinite, numbers)):
        optimizer.step()
    return numbers


def reason(loss: float, norm: float, names: Sequence[str], accelerator: Accelerator) -> str:
    """Why a step is skipped: what was not finite, and on which examples of all processes."""
    all_names = [name for of_rank in distributed.gather(names) for name in of_rank]
    more = f" and {len(all_names) - NAMED:,} more" if len(all_names) > NAMED else ""
    on = "; ".join(all_names[:NAMED]) + more
    return f"loss {loss:g}, gradient norm {norm:g} in {_arithmetic(accelerator)} on {on}"


def advice(accelerator: Accelerator, lr: float | None) -> str:
    """What can help. lr: the peak rate; None if no step was taken yet, so that it is not the cause."""
    arithmetic = _arithmetic(accelerator)
    wider = {"fp32": "", "bf16": "trainer.precision=fp32"}.get(arithmetic, "trainer.precision=bf16 or fp32")
    if lr is not None:
        return f"try optim.lr={lr / 10:g}" + (f", or {wider}" if wider else "")
    no_cause = "no weight has changed yet, so the learning rate is not the cause"
    return f"{no_cause}; try {wider}, or leave these examples out" if wider else f"{no_cause}; leave these examples out"


def _arithmetic(accelerator: Accelerator) -> str:
    return "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)
