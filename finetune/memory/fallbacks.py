"""Running out of memory, noticed and cleaned up after: the same work can then be tried in another way."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from accelerate.utils.memory import clear_device_cache

from finetune.errors import is_gpu_out_of_memory, is_out_of_memory
from finetune.run.progress import say

T = TypeVar("T")
U = TypeVar("U")


def try_within_memory(
    attempt: Callable[[], T],
    drop: Callable[[], Any] = lambda: None,
    is_oom: Callable[[Exception], bool] = is_out_of_memory,
) -> T | None:
    """What `attempt` returns, or None where memory ran out; then `drop` is called and all that is free given back.

    The exception is gone by the time of `drop`: its traceback holds the tensors of every frame it passed.
    """
    try:
        return attempt()
    except Exception as error:
        if not is_oom(error):
            raise
    drop()
    clear_device_cache(garbage_collection=True)
    return None


class AdaptiveBatch:
    """How many things are done at once, and what else can be done about a GPU that is too small for one of them.

    Whatever gives way has given way for good.
    """

    def __init__(self, batch_size: int, *fallbacks: Callable[[], None], doing: str = "") -> None:
        """measures: in turn. doing: what a person is told that fewer are done of; nothing is said without."""
        self.batch_size, self.fallbacks, self.doing = batch_size, list(fallbacks), doing

    def each(self, work: Callable[[Sequence[U]], list[T]], items: Sequence[U]) -> list[T]:
        """What `work` makes of all items. Raises torch.OutOfMemoryError where one is too much after all measures."""
        found: list[T] = []
        while len(found) < len(items):
            part = items[len(found) : len(found) + self.batch_size]
            last = len(part) == 1 and not self.fallbacks
            done = work(part) if last else try_within_memory(partial(work, part), is_oom=is_gpu_out_of_memory)
            if done is not None:
                found += done
            elif len(part) > 1:
                self.batch_size = len(part) // 2
                if self.doing:
                    say(f"the GPU is too small for {len(part)} at once; {self.doing} {self.batch_size}")
            else:
                self.fallbacks.pop(0)()
        return found
