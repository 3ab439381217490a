"""Encoding in several processes, in order and in constant memory.

The processes are spawned: forking a process that holds threads, locks or a GPU hangs. Spawned ones would run a user's
script again where it lacks its `if __name__ == "__main__"`, so that the script is hidden from them.
"""

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.config.schema import LongRows
from finetune.data.text.formats import Conversation
from finetune.data.text.tokens import Chat, Encoded
from finetune.data.text.truncate import truncate
from finetune.errors import DataError, RunError
from finetune.run.cores import usable_cores
from finetune.run.signals import end_with_parent

BATCH = 256  # conversations encoded at once
SEQUENTIAL = 8  # batches encoded here before processes are started: small sets are done sooner than they are
QUEUED = 2  # batches for each process: one in work, one that waits
TRAINED = np.uint32(1 << 31)  # bit of a stored token that says it is trained


@dataclass(frozen=True)
class EncodeSettings:
    """How every conversation is encoded; pickles."""

    chat: Chat
    length: int
    long_rows: LongRows
    skip_bad: bool


@dataclass(eq=False)
class EncodedBatch:
    """Encoded rows. tokens: ids of all rows end to end, uint32, the top bit set where trained.

    lengths, trained, rows, groups: of each encoded row its tokens, its trained tokens, the number of its conversation
    and that one's hash. counts: the whole numbers of `store.Figures`. errors: of conversations that were left out.
    """

    tokens: NDArray[np.uint32]
    lengths: NDArray[np.uint64]
    trained: NDArray[np.uint32]
    rows: NDArray[np.uint64]
    groups: NDArray[np.uint64]
    counts: dict[str, int]
    errors: list[str]


def encode_stream(
    rows: Iterable[Conversation], settings: EncodeSettings, *, processes: int, done: int = 0
) -> Iterator[EncodedBatch]:
    """Every row encoded, in order. processes: how many encode besides this one, 1 for none; 0 is one for each core.

    done: batches from the first on that are there already, and are read over.

    Raises DataError for an unusable row unless `skip_bad`, and RunError if a process fails or dies.
    """
    processes = processes or usable_cores()
    stream = iter(rows)
    batches = itertools.islice(enumerate(iter(lambda: list(itertools.islice(stream, BATCH)), [])), done, None)
    for number, batch in itertools.islice(batches, None if processes == 1 else SEQUENTIAL):
        yield _encode(number * BATCH, batch, settings)
    following = next(batches, None)
    if following is not None:
        yield from _in_parallel(itertools.chain([following], batches), settings, processes)


def _in_parallel(
    batches: Iterator[tuple[int, list[Conversation]]], settings: EncodeSettings, processes: int
) -> Iterator[EncodedBatch]:
    others, started = multiprocessing.active_children(), set()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (settings,))
    queue: deque[Future[EncodedBatch]] = deque()
    try:
        first = list(itertools.islice(batches, QUEUED * processes))
        with _hidden_main():  # the pool starts its processes as it is given the first batches
            queue.extend(pool.submit(_encode_in_worker, number * BATCH, batch) for number, batch in first)
        started = set(multiprocessing.active_children()) - set(others)
        while queue:
            yield queue.popleft().result()
            for number, batch in itertools.islice(batches, 1):
                queue.append(pool.submit(_encode_in_worker, number * BATCH, batch))
    except BrokenProcessPool as error:
        raise RunError(
            "a tokenising process ended by itself (its last lines stand above), perhaps for lack of memory; "
            "try data.workers=1"
        ) from error
    finally:
        if queue:  # an error or Ctrl-C: nobody waits for what is in work
            for process in started:
                process.kill()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """A started process imports what it finds in `sys.modules["__main__"]` then: nothing."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker(settings: EncodeSettings) -> None:
    global _settings
    _settings = settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    gc.set_threshold(100_000)  # offsets are a million pairs a batch: looking for cycles among them costs a seventh


_settings: EncodeSettings  # of this process, if it is a worker: the tokenizer is too large to go with every batch


def _encode_in_worker(first: int, batch: list[Conversation]) -> EncodedBatch:
    try:
        return _encode(first, batch, _settings)
    except DataError:
        raise
    except Exception as error:  # it is reported where somebody reads it
        raise RunError(f"tokenising failed with {type(error).__name__}: {error}; try data.workers=1") from error


def _encode(first: int, batch: list[Conversation], settings: EncodeSettings) -> EncodedBatch:
    """Conversations as token rows that fit the length. first: number of the first conversation."""
    kept: list[Encoded] = []
    numbers: list[int] = []
    groups: list[int] = []
    errors: list[str] = []
    counts = dict.fromkeys(("bad", "long", "left_out", "whole", "shortened", "control"), 0)
    start_id = settings.chat.tokenizer.bos_token_id
    for place, (row, encoded) in enumerate(zip(batch, settings.chat.encode_batch(batch), strict=True)):
        if isinstance(encoded, DataError):
            if not settings.skip_bad:
                raise encoded
            counts["bad"] += 1
            errors.append(str(encoded))
            continue
        pieces = truncate(
            encoded, length=settings.length, policy=settings.long_rows, start_id=start_id, source=row.source
        )
        counts["long"] += len(encoded.ids) > settings.length
        counts["left_out"] += not pieces
        counts["whole"] += int(encoded.trained.sum())
        counts["shortened"] += encoded.shortened
        counts["control"] += encoded.control
        kept += pieces
        numbers += [first + place] * len(pieces)
        groups += [row.group] * len(pieces)
    empty = np.zeros(0, np.uint32)
    tokens = np.concatenate([empty, *(row.ids | (row.trained * TRAINED) for row in kept)]).astype(np.uint32)
    trained = np.array([row.trained.sum() for row in kept], np.uint32)
    counts |= {"conversations": len(batch), "rows": len(kept), "tokens": len(tokens), "trained": int(trained.sum())}
    return EncodedBatch(
        tokens=tokens,
        lengths=np.array([len(row.ids) for row in kept], np.uint64),
        trained=trained,
        rows=np.array(numbers, np.uint64),
        groups=np.array(groups, np.uint64),
        counts=counts,
        errors=errors,
    )
