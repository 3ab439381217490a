"""SIGINT and SIGTERM end a command after the step or look at hand instead of cutting it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finetune.run import ranks


class Stop:
    """Set once a signal asked for the end. noted: the signal that this process got; number: on which all agree.

    One process agrees at once, several in the loop: all have to end after the same step.
    """

    noted: int | None = None
    number: int | None = None


def cause(number: int) -> str:
    """A signal in words."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def catch_stop() -> Iterator[Stop]:
    """Collect SIGINT and SIGTERM while the block runs; a second one acts at once, as if nothing had caught the first.

    Not so with several processes: their launcher passes signals on, so that one from outside may come twice. What they
    have not agreed on by the end of the block acts then.
    Outside the main thread (some notebooks) Python can't catch signals: the block then runs without.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        stop.noted = number
        if ranks.world_size() == 1:
            stop.number = number
            signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.noted is not None and stop.number is None:
        signal.raise_signal(stop.noted)


def end_with_parent() -> None:
    """Let this process of a pool end as soon as the one that started it does: a killed one can't stop its pool."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
