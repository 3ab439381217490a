"""What the engines of texts and of images have in common: one thread that works, and a queue with an end before it."""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from finetune.serving.requests import Refused

T = TypeVar("T")


class EngineThread(ABC):
    """Its thread calls `_run`; all it shares with others is touched with `_changed` held."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._work: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def between_steps(self, work: Callable[[], T]) -> T:
        """See `adapters.Holder`."""
        done: Future[T] = Future()
        with self._changed:
            self._work.append((work, done))
            self._changed.notify()
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """Finish what has begun and end. Later requests are refused."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise Refused(503, "this server is shutting down", code="shutting_down", retry_after_s=5)

    @abstractmethod
    def _run(self) -> None:
        """What the thread does until `_closing`."""
