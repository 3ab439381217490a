"""What is tried, one thing after the other, when memory runs out in a training step."""

from collections.abc import Callable

from finetune.errors import OutOfMemory


class OomFallbacks:
    """The micro-batch by halves, and below 1 what the task offers.

    micro_batch: the most examples of one forward pass, now. applied: the task's fallbacks that were applied, as
    settings.
    """

    def __init__(self, micro_batch: int, reduce_memory: Callable[[], str | None], hint: str) -> None:
        """micro_batch: the requested one. reduce_memory: as in `Task`. hint: what to type when no fallback is left."""
        self.requested = self.micro_batch = micro_batch
        self.applied: list[str] = []
        self.reduce_memory, self.hint = reduce_memory, hint

    def restore(self, micro_batch: int, fallbacks: int) -> None:
        """Apply what an earlier part of the run had to: that micro-batch, and so many of the task's fallbacks."""
        self.micro_batch = micro_batch
        for _ in range(fallbacks):
            self._reduce_memory()

    def next_fallback(self, largest: int) -> str:
        """Apply the next one and name it. largest: most examples that a forward pass of the failed step had.

        Raises OutOfMemory when no fallback is left.
        """
        if largest > 1:
            self.micro_batch = largest // 2
            return f"micro-batch {self.micro_batch}"
        if setting := self._reduce_memory():
            return setting
        raise OutOfMemory(f"out of memory with {self.summary or 'micro-batch 1'}; {self.hint}")

    @property
    def summary(self) -> str:
        """All fallbacks applied so far, for people; empty if memory was enough."""
        lowered = [f"micro-batch {self.micro_batch} instead of {self.requested}"]
        return ", ".join([*(lowered if self.micro_batch < self.requested else []), *self.applied])

    def _reduce_memory(self) -> str | None:
        if setting := self.reduce_memory():
            self.applied.append(setting)
        return setting
