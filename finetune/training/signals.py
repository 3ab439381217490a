"""SIGINT and SIGTERM finish the step instead of cutting it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Set once a signal asked for the end; `number` is the signal's."""

    number: int | None = None


@contextmanager
def catch_stop() -> Iterator[Stop]:
    """Collect SIGINT and SIGTERM while the block runs; a second one acts at once, as if nothing had caught the first.

    Outside the main thread (some notebooks) Python can't catch signals: the block then runs without.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        stop.number = number
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
