"""Several processes of one run, as torchrun and accelerate start them: who speaks, who waits, how errors travel.

The first process does alone what is done once a run, and the others wait for what it returns. What fails in one of them
is raised in all. Both go through torch's key-value store, which needs no GPU and waits as long as a stage takes.
"""

import atexit
import itertools
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from finetune.errors import RunError
from finetune.run.ranks import rank, world_size

T = TypeVar("T")
TIMEOUT_S = 24 * 3600.0  # captions of a large folder take hours, in which the other processes only wait
POLL_ERRORS_S = 0.2  # for errors of the others
HEARD_S = 2.0  # that an error waits to be heard, before the store may go with the first process
LONGEST_PAUSE_S = 0.01  # short against a step, which ends in such a wait
ERROR, LEFT = "error", "left"


@contextmanager
def process_group() -> Iterator[None]:
    """Inside, the processes work on one run together. An error in one is raised in all; the first one leaves first.

    So its line about an error is on the screen before a launcher sees another process fail and ends them all.
    """
    global _channel
    if world_size() == 1:
        yield
        return
    _channel = channel = _Channel(next(_runs))
    atexit.register(_disband)
    try:
        yield
    except BaseException as error:
        atexit.unregister(_disband)  # nobody knows what the others are in the middle of
        channel.tell(error)
        if rank() == 0:
            told = time.monotonic()
            _until(lambda: channel.failures() == world_size() or time.monotonic() - told > HEARD_S)
        raise
    finally:
        if rank() == 0:
            channel.put(LEFT, True)
        else:
            with suppress(RuntimeError):  # without a launcher's store the first process takes its own along
                _until(lambda: channel.has(LEFT))


def on_first_rank(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in every process: the others wait for it and get a copy."""
    if world_size() == 1:
        return work()
    key = _channel.number()
    if rank() == 0:
        _channel.put(key, work())
    wait(lambda: _channel.has(key))
    result: T = _channel.get(key)
    return result


def gather(value: T) -> list[T]:
    """What every process says, in their order, in every process."""
    if world_size() == 1:
        return [value]
    number = _channel.number()
    keys = [f"{number}/{process}" for process in range(world_size())]
    _channel.put(keys[rank()], value)
    wait(lambda: all(map(_channel.has, keys)))
    return [_channel.get(key) for key in keys]


def wait(done: Callable[[], bool]) -> None:
    """Return once `done()`. Raises the error of another process, RunError after a day."""

    def heard() -> None:
        # Who fails after its part is done ends nobody's wait for that part.
        if _channel.has(ERROR) and not done():
            raise _channel.get(ERROR)

    _until(done, heard)


def _until(done: Callable[[], bool], now_and_then: Callable[[], None] = lambda: None) -> None:
    """In short sleeps, so that a signal is heard at once."""
    began = looked = time.monotonic()
    pause = LONGEST_PAUSE_S / 128
    while not done():
        now = time.monotonic()
        if now - looked >= POLL_ERRORS_S:
            looked = now
            now_and_then()
        if now - began > TIMEOUT_S:
            raise RunError(f"process {rank()} waited {TIMEOUT_S / 3600:g} hours for another; start all of them again")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


class _Channel:
    """What the processes of one run tell one another. All take numbers in the same order, so that they agree."""

    def __init__(self, run: int) -> None:
        from torch.distributed.rendezvous import rendezvous

        # The way that torch's process groups take too: the launcher's store, or else one in the first process.
        self.store, _, _ = next(rendezvous("env://"))
        self.run, self.numbers = run, itertools.count()

    def number(self) -> str:
        return str(next(self.numbers))

    def has(self, key: str) -> bool:
        return bool(self.store.check([self._full(key)]))

    def put(self, key: str, value: object) -> None:
        self.store.set(self._full(key), pickle.dumps(value))

    def get(self, key: str) -> Any:
        return pickle.loads(self.store.get(self._full(key)))

    def tell(self, error: BaseException) -> None:
        """Only the first error counts: the others follow from it, or say the same."""
        if self.store.add(self._full("failures"), 1) == 1:
            self.put(ERROR, _portable(error))

    def failures(self) -> int:
        """How many processes have told one."""
        return int(self.store.add(self._full("failures"), 0))

    def _full(self, key: str) -> str:
        return f"finetune/{self.run}/{key}"


_runs = itertools.count()
_channel: _Channel


def _portable(error: BaseException) -> BaseException:
    """An error that another process can raise. Some can't be packed, or not unpacked: of those the text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _disband() -> None:
    """End the process group as NCCL wants it. Only when all runs are over: a second one would meet the first's keys."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
