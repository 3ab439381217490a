"""Counts what a process does to files, and kills its process group at one of these operations.

Counted are files opened for writing, writes, renames, removals, folders made or removed, links and flushes, of Python;
native libraries show where Python opens, renames or removes around them. Every kill is before its operation, but in a
write, which is cut in half first.
"""

import builtins
import io
import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
STAGES = str(Path("finetune", "stages")) + os.sep
START = "run folder"  # the stage of what is done outside the stages: lock, configuration


@dataclass(frozen=True)
class Operation:
    """One of them. stage: which stage of the command it belongs to."""

    stage: str
    name: str
    path: str


class Operations:
    """The operations of this process below its working folder, written to `log` as lines of JSON.

    kill_at: number of the one at which the process group ends, from 1; 0 is none.
    """

    def __init__(self, log: Path, kill_at: int) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._root, self._kill_at, self._count = str(Path.cwd()), kill_at, 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Count from now on."""
        flush, plain_open, operations = os.fsync, io.open, self

        class CountedFile(io.FileIO):
            def write(self, data: Any, /) -> int:
                half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
                operations.reach("write", str(self.name), lambda: super(CountedFile, self).write(half))
                return super().write(data)

        def counted_open(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
                         newline: Any = None, closefd: bool = True, opener: Any = None) -> Any:  # fmt: skip
            if not set(mode) & set("wax+") or isinstance(file, int) or buffering == 0 or not self._is_ours(file):
                return plain_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = CountedFile(os.fspath(file), mode.replace("b", "").replace("t", ""), closefd, opener)
            binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline, buffering == 1)

        def counted_flush(file: Any) -> None:
            self.reach("fsync", "")
            flush(file)

        builtins.open = io.open = counted_open  # type: ignore[assignment]
        os.fsync = counted_flush
        sys.addaudithook(self._audit)

    def reach(self, name: str, path: str, torn: Any = None) -> None:
        """Count an operation that is about to be done, and end here if it is the one. torn: does half of it."""
        with self._lock:
            self._count += 1
            number = self._count
            operation = Operation(_stage(), name, path.removeprefix(self._root).lstrip(os.sep))
            os.write(self._log, (json.dumps(asdict(operation)) + "\n").encode())
        if number == self._kill_at:
            if torn:
                torn()
            os.killpg(0, signal.SIGKILL)

    def _audit(self, event: str, values: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(values[2], int) and values[2] & WRITING and self._is_ours(values[0]):
                self.reach("open", os.fsdecode(values[0]))
        elif event in EVENTS and self._is_ours(values[0]):
            self.reach(event.removeprefix("os."), os.fsdecode(values[0]))

    def _is_ours(self, path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return False
        text = os.fsdecode(path)
        return not text.startswith(os.sep) or text.startswith(self._root + os.sep)


def read(log: Path) -> list[Operation]:
    """What was logged."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [Operation(**json.loads(line)) for line in lines]


def _stage() -> str:
    """The stage that is at work: the innermost in this thread's calls, or in the main thread's."""
    for frame in (sys._getframe(), sys._current_frames()[threading.main_thread().ident or 0]):
        step: Any = frame
        while step is not None:
            _, found, name = step.f_code.co_filename.rpartition(STAGES)
            if found:
                return str(Path(name).stem)
            step = step.f_back
    return START
