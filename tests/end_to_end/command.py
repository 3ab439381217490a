"""The real command as a process of its own: started, watched, cut, and what it left on the screen."""

import contextlib
import hashlib
import io
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tests.conftest import ROOT

COMMAND = (sys.executable, "-m", "finetune")
LIMIT_S = 900  # several times what the longest command takes on two busy cores
POLL_S = 0.002
RSS_UNITS_PER_GIB = 2**30 if sys.platform == "darwin" else 2**20  # getrusage counts bytes there, KiB elsewhere


@dataclass(frozen=True)
class Finished:
    """How a command ended. code: as Python gives it, -9 after SIGKILL; cpu_s: user and system time of all cores."""

    code: int
    out: str
    err: str
    seconds: float
    cpu_s: float
    peak_gib: float

    @property
    def errors(self) -> list[str]:
        """The lines that say what went wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Running:
    """A command in progress."""

    def __init__(self, words: Sequence[str], cwd: Path, logs: Path, environment: Mapping[str, str]) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        number = len(list(logs.iterdir()))
        self.out, self.err = logs / f"{number}.out", logs / f"{number}.err"
        self.began = time.monotonic()
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(words, cwd=cwd, stdout=out, stderr=err, env={**os.environ, **environment})

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        """Return as soon as the condition holds; fails if the command ends before, or it takes too long."""
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.err.read_text()}"
            assert time.monotonic() - self.began < LIMIT_S, f"no {what} within {LIMIT_S} s:\n{self.err.read_text()}"
            time.sleep(POLL_S)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self) -> Finished:
        """Wait for the end."""
        while not (ended := os.wait4(self.process.pid, os.WNOHANG))[0]:
            if time.monotonic() - self.began > LIMIT_S:
                self.process.kill()
            time.sleep(POLL_S)
        _, status, usage = ended
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self._finished(usage)

    def _finished(self, usage: resource.struct_rusage) -> Finished:
        return Finished(
            code=self.process.returncode,
            out=self.out.read_text(encoding="utf-8"),
            err=self.err.read_text(encoding="utf-8"),
            seconds=time.monotonic() - self.began,
            cpu_s=usage.ru_utime + usage.ru_stime,
            peak_gib=usage.ru_maxrss / RSS_UNITS_PER_GIB,
        )


def start(*words: str, cwd: Path, before: Sequence[str] = (), **environment: str) -> Running:
    """Start `python -m finetune WORDS` in a folder. before: a program that starts it, such as unshare."""
    return Running([*before, *COMMAND, *words], cwd, cwd.parent / f"{cwd.name}-logs", environment)


def run(*words: str, cwd: Path, before: Sequence[str] = (), **environment: str) -> Finished:
    """Run `python -m finetune WORDS` in a folder to its end."""
    return start(*words, cwd=cwd, before=before, **environment).finish()


def script(name: str, *words: str) -> str:
    """What `python scripts/NAME WORDS` prints. In this process, which has the libraries already."""
    file, out = str(ROOT / "scripts" / name), io.StringIO()
    with mock.patch.object(sys, "argv", [file, *words]), contextlib.redirect_stdout(out):
        runpy.run_path(file, run_name="__main__")
    return out.getvalue()


def contents(*folders: Path) -> dict[str, str]:
    """Hash of every file below some folders."""
    files = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def captions(folder: Path) -> dict[str, str]:
    """The rows of an image folder's metadata.jsonl; empty where there is none yet."""
    file = folder / "metadata.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {row["file_name"]: row["text"] for row in map(json.loads, lines)}
