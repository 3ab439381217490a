"""What gives way when memory runs out in a step, from rung to rung."""

from collections.abc import Callable

from finetune.errors import OutOfMemory


class OomFallbacks:
    """What gives way when memory runs out in a step: the micro-batch by halves, and below 1 what the task offers.

    micro_batch: the most examples of one forward pass, now. applied: the task's that were taken, as settings.
    """

    def __init__(self, micro_batch: int, reduce_memory: Callable[[], str | None], advice: str) -> None:
        """micro_batch: what was asked for. relieve: as in `Task`. advice: what to type when nothing is left."""
        self.requested = self.micro_batch = micro_batch
        self.applied: list[str] = []
        self.reduce_memory, self.advice = reduce_memory, advice

    def restore(self, micro_batch: int, applied: int) -> None:
        """Go down to where an earlier part of the run stood: that micro-batch, and so many measures."""
        self.micro_batch = micro_batch
        for _ in range(applied):
            self._apply_next()

    def next_fallback(self, largest: int) -> str:
        """Take the next rung and say which. largest: most examples that a forward pass of the failed step had.

        Raises OutOfMemory when there is none.
        """
        if largest > 1:
            self.micro_batch = largest // 2
            return f"micro-batch {self.micro_batch}"
        if measure := self._apply_next():
            return measure
        raise OutOfMemory(f"out of memory with {self.summary or 'micro-batch 1'}; {self.advice}")

    @property
    def summary(self) -> str:
        """All rungs taken so far, for people; empty if memory was enough."""
        lowered = (
            [f"micro-batch {self.micro_batch} instead of {self.requested}"] if self.micro_batch < self.requested else []
        )
        return ", ".join([*lowered, *self.applied])

    def _apply_next(self) -> str | None:
        if measure := self.reduce_memory():
            self.applied.append(measure)
        return measure
