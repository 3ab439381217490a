"""What gives way when memory runs out in a step, from rung to rung."""

from collections.abc import Callable

from finetune.errors import OutOfMemory


class Ladder:
    """What gives way when memory runs out in a step: the micro-batch by halves, and below 1 what the task offers.

    micro_batch: the most examples of one forward pass, now. measures: the task's that were taken, as settings.
    """

    def __init__(self, micro_batch: int, relieve: Callable[[], str | None], advice: str) -> None:
        """micro_batch: what was asked for. relieve: as in `Task`. advice: what to type when nothing is left."""
        self.asked = self.micro_batch = micro_batch
        self.measures: list[str] = []
        self.relieve, self.advice = relieve, advice

    def restore(self, micro_batch: int, measures: int) -> None:
        """Go down to where an earlier part of the run stood: that micro-batch, and so many measures."""
        self.micro_batch = micro_batch
        for _ in range(measures):
            self._measure()

    def descend(self, largest: int) -> str:
        """Take the next rung and say which. largest: most examples that a forward pass of the failed step had.

        Raises OutOfMemory when there is none.
        """
        if largest > 1:
            self.micro_batch = largest // 2
            return f"micro-batch {self.micro_batch}"
        if measure := self._measure():
            return measure
        raise OutOfMemory(f"out of memory with {self.summary or 'micro-batch 1'}; {self.advice}")

    @property
    def summary(self) -> str:
        """All rungs taken so far, for people; empty if memory was enough."""
        lowered = [f"micro-batch {self.micro_batch} instead of {self.asked}"] if self.micro_batch < self.asked else []
        return ", ".join([*lowered, *self.measures])

    def _measure(self) -> str | None:
        if measure := self.relieve():
            self.measures.append(measure)
        return measure
