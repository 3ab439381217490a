"""The one way in which noisy figures are smoothed: progress bar, summary, report and TensorBoard show the same.

An exponential mean without bias to its start (the correction of Adam, arXiv 1412.6980, §3): the first value counts as
much as if it had come later. It looks back over about a tenth of the run, so that the curve of a short run, in which
everything falls within a few steps, doesn't lie far above the values.
"""

SHARE_OF_RUN = 0.1
LONGEST = 20.0  # steps; more would hide how a long run changes


def new_weight(steps: int) -> float:
    """The weight of the newest value in a run of so many steps, once there are many."""
    return 1 / min(LONGEST, max(1.0, SHARE_OF_RUN * steps))


def smoothed(before: float, value: float, number: int, weight: float) -> float:
    """The mean after value `number` (counted from 1), from the mean before it, which is not looked at for the first."""
    return value if number == 1 else before + (value - before) * weight / (1 - (1 - weight) ** number)
