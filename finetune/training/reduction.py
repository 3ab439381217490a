"""Several processes, one step: gradients, losses and counts of each become those of all, in one reduction a step.

P trained parameters, N their numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from finetune.errors import RunError
from finetune.run import ranks
from finetune.run.signals import Stop
from finetune.training import distributed


@dataclass(frozen=True)
class StepTotals:
    """What one process, or all of them, computed in a step.

    loss: summed over `items`, 0-dim; reading it waits for the GPU. count, padded_count: as in `Batch`. flagged_ranks:
    processes with something to report.
    """

    loss: Tensor
    items: int
    count: int
    padded_count: int
    flagged_ranks: int = 0


NAMES = tuple(field.name for field in fields(StepTotals))


def reduce_step(
    parameters: Sequence[nn.Parameter], mine: StepTotals, fallbacks: list[str], stop: Stop
) -> tuple[StepTotals, list[str]]:
    """Totals and gradients of all processes, and the fallbacks that any of them needed: where memory runs out in one,
    the others only wait. stop: becomes what all agree on.

    Raises the error of a process that can't take part any more.
    """
    if ranks.world_size() == 1:
        return mine, fallbacks
    totals = _all_reduce(parameters, replace(mine, flagged_ranks=int(bool(fallbacks) or stop.noted is not None)))
    if totals.flagged_ranks:
        reported = distributed.gather((fallbacks, stop.noted))
        fallbacks = list(dict.fromkeys(line for lines, _ in reported for line in lines))
        stop.number = next((number for _, number in reported if number is not None), None)
    return totals, fallbacks


def _all_reduce(parameters: Sequence[nn.Parameter], mine: StepTotals) -> StepTotals:
    """The sum of all processes' totals; `.grad` of their means over own items becomes the mean over all items."""
    sizes = [parameter.numel() for parameter in parameters]
    # fp32: counts beyond 2**24 are rounded, which no loss can feel.
    flat = torch.zeros(len(NAMES) + len(sizes) + sum(sizes), device=parameters[0].device)
    head, trained_P, gradients_N = torch.split(flat, [len(NAMES), len(sizes), sum(sizes)])
    head.copy_(torch.tensor([float(getattr(mine, name)) for name in NAMES]))
    trained_P.copy_(torch.tensor([float(parameter.grad is not None) for parameter in parameters]))
    parts = torch.split(gradients_N, sizes)
    for parameter, part in zip(parameters, parts, strict=True):
        if parameter.grad is not None:
            torch.mul(parameter.grad.flatten(), mine.items, out=part)
    _sum(flat)
    numbers = flat[: len(NAMES) + len(sizes)].tolist()  # at once: each reading waits for the GPU
    items, count, padded_count, flagged_ranks = map(round, numbers[1 : len(NAMES)])
    # A parameter that no process has a gradient of must not get one: zeros would count in an optimiser's state.
    for parameter, part, trained in zip(parameters, parts, numbers[len(NAMES) :], strict=True):
        if trained:
            parameter.grad = part.div_(items).view_as(parameter).to(parameter.dtype)
    return StepTotals(head[0], items, count, padded_count, flagged_ranks)


@torch.no_grad()
def broadcast_start(parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the first one's weights: equal starts and equal gradients keep them equal to the end."""
    if ranks.world_size() == 1:
        return
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    if ranks.rank():
        flat.zero_()
    _sum(flat)
    parts = torch.split(flat, [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


def _sum(flat: Tensor) -> None:
    """In place, over all processes. Polled, because a process that failed would be waited for without end.

    Raises its error, or RunError where it was killed.
    """
    work = torch.distributed.all_reduce(flat, async_op=True)
    distributed.wait(work.is_completed)
    try:
        work.wait()
    except RuntimeError as error:  # what is torn is the line to it; a process that fails by an error of its own says so
        raise RunError("another process was killed; the same command goes on from the last checkpoint") from error
