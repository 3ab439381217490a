"""One step of the largest micro-batches there may be, before the first real one, and undone."""

import torch
from accelerate import Accelerator

from finetune.training.loop import forward_backward
from finetune.training.oom import OomFallbacks
from finetune.training.task import Task


def dry_run(
    task: Task,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    fallbacks: OomFallbacks,
    micro_batches: int,
) -> list[str]:
    """Run one step on so many of the largest micro-batches, then restore the weights; return the fallbacks it needed.

    optimizer: over the task's trained parameters and for this alone. Its state is there before the step, as it is in
    all steps of the run but the first, and stays. Raises OutOfMemory when no fallback is left.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    task.model.train()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    *_, needed = forward_backward(
        task,
        lambda size: [task.collate(task.worst(size))] * micro_batches,
        optimizer,
        accelerator,
        fallbacks,
        seed=0,
        step=0,
    )
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return needed
