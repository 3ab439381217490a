"""Running out of memory, noticed and cleaned up after: the same work can then be tried in another way."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from accelerate.utils.memory import clear_device_cache

from finetune.errors import card_ran_out, is_out_of_memory
from finetune.run.progress import say

T = TypeVar("T")
U = TypeVar("U")


def within_memory(
    attempt: Callable[[], T],
    drop: Callable[[], Any] = lambda: None,
    ran_out: Callable[[Exception], bool] = is_out_of_memory,
) -> T | None:
    """What `attempt` returns, or None where memory ran out; then `drop` is called and all that is free given back.

    The exception is gone by the time of `drop`: its traceback holds the tensors of every frame it passed.
    """
    try:
        return attempt()
    except Exception as error:
        if not ran_out(error):
            raise
    drop()
    clear_device_cache(garbage_collection=True)
    return None


class Portions:
    """How many things are done at once, and what else can be done about a card that is too small for one of them.

    Whatever gives way has given way for good.
    """

    def __init__(self, at_once: int, *measures: Callable[[], None], doing: str = "") -> None:
        """measures: in turn. doing: what a person is told that fewer are done of; nothing is said without."""
        self.at_once, self.measures, self.doing = at_once, list(measures), doing

    def each(self, work: Callable[[Sequence[U]], list[T]], items: Sequence[U]) -> list[T]:
        """What `work` makes of all items. Raises torch.OutOfMemoryError where one is too much after all measures."""
        found: list[T] = []
        while len(found) < len(items):
            part = items[len(found) : len(found) + self.at_once]
            last = len(part) == 1 and not self.measures
            done = work(part) if last else within_memory(partial(work, part), ran_out=card_ran_out)
            if done is not None:
                found += done
            elif len(part) > 1:
                self.at_once = len(part) // 2
                if self.doing:
                    say(f"the card is too small for {len(part)} at once; {self.doing} {self.at_once}")
            else:
                self.measures.pop(0)()
        return found
