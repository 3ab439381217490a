"""Functions in forks of this process, several at once."""

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def in_forks(work: Iterable[Callable[[], T]], folder: Path, *, at_once: int) -> Iterator[T]:
    """What each function returns, as they end. Raises RuntimeError if one raises, after the others have ended."""
    remaining, running, number = iter(work), {}, 0
    failed = False
    while True:
        while len(running) < at_once and not failed and (job := next(remaining, None)) is not None:
            number += 1
            answer = folder / f"answer-{number}"
            running[_fork(job, answer)] = answer
        if not running:
            break
        process, status = os.wait()
        answer = running.pop(process)
        if status:
            failed = True
            continue
        result: T = pickle.loads(answer.read_bytes())
        answer.unlink()
        yield result
    if failed:
        raise RuntimeError("a job failed; its error stands above")


def _fork(job: Callable[[], T], answer: Path) -> int:
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        answer.write_bytes(pickle.dumps(job()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
