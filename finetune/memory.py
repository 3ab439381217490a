"""Running out of memory, noticed and cleaned up after: the same work can then be tried in another way."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils.memory import clear_device_cache

from finetune.errors import is_out_of_memory

T = TypeVar("T")


def within_memory(attempt: Callable[[], T], drop: Callable[[], Any] = lambda: None) -> T | None:
    """What `attempt` returns, or None where memory ran out; then `drop` is called and all that is free given back.

    The exception is gone by the time of `drop`: its traceback holds the tensors of every frame it passed.
    """
    try:
        return attempt()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    drop()
    clear_device_cache(garbage_collection=True)
    return None
