"""Encoding in several processes, in order and in constant memory.

The processes are started afresh and fed through pipes: forking a process that holds threads, locks or a GPU hangs, and
`multiprocessing` would run a user's script again where it lacks its `if __name__ == "__main__"`.
"""

import gc
import itertools
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.config.schema import LongRows
from finetune.data.text.formats import Conversation
from finetune.data.text.tokens import Chat, Encoded
from finetune.data.text.truncate import truncate
from finetune.errors import DataError, RunError

BATCH = 256  # rows sent at once
ALONE = 8  # batches encoded here before other processes are started: small sets are done sooner than they are
TRAINED = np.uint32(1 << 31)  # bit of a stored token that says it is trained
SERVE = "import sys; sys.path[:0] = [sys.argv[1]]; from finetune.data.text.workers import serve; serve()"


@dataclass(frozen=True)
class Work:
    """What is done to every row; pickles."""

    chat: Chat
    length: int
    long_rows: LongRows
    skip_bad: bool


@dataclass(eq=False)
class Chunk:
    """Encoded rows. tokens: ids of all rows end to end, uint32, the top bit set where trained.

    lengths, trained, rows, groups: of each encoded row its tokens, its trained tokens, the number of its conversation
    and that one's hash. counts: see `_encode`. errors: of conversations that were left out.
    """

    tokens: NDArray[np.uint32]
    lengths: NDArray[np.uint64]
    trained: NDArray[np.uint32]
    rows: NDArray[np.uint64]
    groups: NDArray[np.uint64]
    counts: dict[str, int]
    errors: list[str]


def encode_stream(rows: Iterable[Conversation], work: Work, *, processes: int) -> Iterator[Chunk]:
    """Every row encoded, in order. processes: how many encode besides this one, 1 for none; 0 is one for each core.

    Raises DataError for an unusable row unless `skip_bad`, and RunError if a process dies.
    """
    processes = processes or _cores()
    stream = iter(rows)
    batches = enumerate(iter(lambda: list(itertools.islice(stream, BATCH)), []))
    for number, batch in itertools.islice(batches, None if processes == 1 else ALONE):
        yield _encode(number * BATCH, batch, work)
    following = next(batches, None)
    if following is not None:
        yield from _in_parallel(itertools.chain([following], batches), work, processes)


def serve() -> None:
    """A process's work: pickled batches on standard input, pickled results on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    gc.set_threshold(100_000)  # offsets are a million pairs a batch: looking for cycles among them costs a seventh
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between results
    work: Work = pickle.load(sys.stdin.buffer)
    while True:
        try:
            first, batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: Chunk | Exception
        try:
            answer = _encode(first, batch, work)
        except DataError as error:
            answer = error
        except Exception as error:  # it is reported where somebody reads it
            answer = RunError(f"tokenising failed with {type(error).__name__}: {error}")
        pickle.dump(answer, results, pickle.HIGHEST_PROTOCOL)
        results.flush()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # a container may have fewer than the machine
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _in_parallel(batches: Iterator[tuple[int, list[Conversation]]], work: Work, processes: int) -> Iterator[Chunk]:
    """One batch is under way in each process at most, so that no pipe can be full on both sides."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _, batch in zip(range(processes), batches, strict=False):
            started.append(_start(work))
            _send(started[-1], (batch[0] * BATCH, batch[1]))
        waiting = itertools.cycle(started)
        left = len(started)
        while left:
            process = next(waiting)
            chunk = _receive(process)
            following = next(batches, None)
            if following is None:
                left -= 1
            else:
                _send(process, (following[0] * BATCH, following[1]))
            yield chunk
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _start(work: Work) -> "subprocess.Popen[bytes]":
    package = str(Path(__file__).resolve().parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, package],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
    )
    _send(process, work)
    return process


def _send(process: "subprocess.Popen[bytes]", value: object) -> None:
    assert process.stdin is not None
    try:
        pickle.dump(value, process.stdin, pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()
    except OSError as error:
        raise _died(process) from error


def _receive(process: "subprocess.Popen[bytes]") -> Chunk:
    assert process.stdout is not None
    try:
        answer: Any = pickle.load(process.stdout)
    except (EOFError, OSError, pickle.UnpicklingError) as error:
        raise _died(process) from error
    if isinstance(answer, Exception):
        raise answer
    assert isinstance(answer, Chunk)
    return answer


def _died(process: "subprocess.Popen[bytes]") -> RunError:
    process.kill()
    return RunError(
        f"a tokenising process ended by itself (exit code {process.wait()}; its last lines stand above), perhaps for "
        "lack of memory; try data.workers=1"
    )


def _encode(first: int, batch: list[Conversation], work: Work) -> Chunk:
    """Rows encoded and made to fit. first: number of the first one.

    counts: rows that were read, `bad` (unusable), `long`, `left_out` (long, and nothing of them is left), `whole`
    (trained tokens before anything was cut), `shortened` and `control` as in `Encoded`.
    """
    kept: list[Encoded] = []
    numbers: list[int] = []
    groups: list[int] = []
    errors: list[str] = []
    counts = dict.fromkeys(("bad", "long", "left_out", "whole", "shortened", "control"), 0) | {"rows": len(batch)}
    start_id = work.chat.tokenizer.bos_token_id
    for place, (row, encoded) in enumerate(zip(batch, work.chat.encode_all(batch), strict=True)):
        if isinstance(encoded, DataError):
            if not work.skip_bad:
                raise encoded
            counts["bad"] += 1
            errors.append(str(encoded))
            continue
        pieces = truncate(encoded, length=work.length, policy=work.long_rows, start_id=start_id, source=row.source)
        counts["long"] += len(encoded.ids) > work.length
        counts["left_out"] += not pieces
        counts["whole"] += int(encoded.trained.sum())
        counts["shortened"] += encoded.shortened
        counts["control"] += encoded.control
        kept += pieces
        numbers += [first + place] * len(pieces)
        groups += [row.group] * len(pieces)
    empty = np.zeros(0, np.uint32)
    return Chunk(
        tokens=np.concatenate([empty, *(row.ids | (row.trained * TRAINED) for row in kept)]).astype(np.uint32),
        lengths=np.array([len(row.ids) for row in kept], np.uint64),
        trained=np.array([row.trained.sum() for row in kept], np.uint32),
        rows=np.array(numbers, np.uint64),
        groups=np.array(groups, np.uint64),
        counts=counts,
        errors=errors,
    )
