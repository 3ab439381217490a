"""Run cases in forked children of a process that has imported everything, and judge how each ended."""

import gc
import hashlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetune import cli
from scripts.fuzz import workbench
from scripts.fuzz.cases import Case

LIMIT_S = 20.0  # of a core, so that a busy machine changes nothing
WAITING_S = 120.0  # of the clock, for what waits and computes nothing
MEMORY_GIB = 3.0  # above what the parent takes
ADDRESSES_GIB = 24  # a bound for the kernel to hold, above the watched one
POLL_S = 0.02
PAGE_GIB = os.sysconf("SC_PAGE_SIZE") / 2**30
CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 130, 143}  # finetune/errors.py
LONGEST_LINE = 4000  # characters of a message; beyond it nobody reads
HASHED_BYTES = 64 * 2**20  # sparse files are known by their size


@dataclass(frozen=True)
class Outcome:
    """How a case ended. faults: what must not be; empty if all is well."""

    case: Case
    what: str
    code: int
    seconds: float
    peak_gib: float
    faults: tuple[str, ...]
    output: str


@dataclass
class _Child:
    case: Case
    pid: int
    folder: Path
    began: float
    peak_gib: float = 0.0
    killed: str = ""


def run(cases: Iterable[Case], source: Path, scratch: Path, jobs: int) -> Iterator[Outcome]:
    """Each case in a copy of the workbench `source`, `jobs` at once, in the order in which they end."""
    gc.collect()
    gc.freeze()  # children would copy and walk half a million objects
    waiting, running = iter(cases), dict[int, _Child]()
    base_gib = _resident_gib(os.getpid())
    while True:
        while len(running) < jobs and (case := next(waiting, None)) is not None:
            child = _start(case, source, scratch)
            running[child.pid] = child
        if not running:
            return
        for child in list(running.values()):
            child.peak_gib = max(child.peak_gib, _resident_gib(child.pid) - base_gib)
            late = _cpu_s(child.pid) > LIMIT_S or time.monotonic() - child.began > WAITING_S
            if not child.killed and (late or child.peak_gib > MEMORY_GIB):
                child.killed = f"no end within {LIMIT_S:.0f} s of a core" if late else f"more than {MEMORY_GIB:.0f} GiB"
                os.killpg(child.pid, signal.SIGKILL)
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                with suppress(ProcessLookupError):  # processes that it left behind
                    os.killpg(pid, signal.SIGKILL)
                yield _judged(running.pop(pid), os.waitstatus_to_exitcode(status))
        time.sleep(POLL_S)


def _start(case: Case, source: Path, scratch: Path) -> _Child:
    folder = scratch / str(case.number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)
        return _Child(case, pid, folder, time.monotonic())
    code = 99
    try:
        code = _live(case, source, folder)
    except BaseException:
        os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
    finally:
        os._exit(code)


def _live(case: Case, source: Path, folder: Path) -> int:
    """The child: a copy of the workbench, the damage, the command."""
    os.setpgid(0, 0)
    output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="backslashreplace")
    logging.root.handlers.clear()  # they write to the parent's stderr
    home = folder / "home" / "here"
    shutil.copytree(source, home)
    os.environ["HOME"] = str(home.parent)
    os.chdir(home)
    (folder / "what").write_text(ascii(case.prepare()))
    (folder / "before").write_text(_people(home))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES_GIB * 2**30,) * 2)
    try:
        return cli.main(case.words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / "after").write_text(_people(home))


def _people(home: Path) -> str:
    """The files that are not the commands' to change, each with its content's hash."""
    lines = []
    for path in sorted(home.rglob("*")):
        relative = path.relative_to(home)
        if (
            str(relative) == workbench.METADATA and path.is_file() and path.stat().st_size < HASHED_BYTES
        ):  # commands add texts
            lines += [f"{row!r} {relative}" for row in path.read_bytes().splitlines() if _is_caption(row)]
        elif relative.parts[0] not in workbench.MADE and path.is_file():
            lines.append(f"{_content(path)} {str(relative)!a}")
    return "\n".join(lines)


def _is_caption(row: bytes) -> bool:
    """Whether a row says something of its image; one without words is filled in."""
    try:
        values = json.loads(row)
        return bool(values["text"].strip())
    except ValueError:
        return b'"text"' in row
    except (AttributeError, LookupError, TypeError):
        return False


def _content(path: Path) -> str:
    size = path.stat().st_size
    return str(size) if size > HASHED_BYTES else hashlib.sha256(path.read_bytes()).hexdigest()


def _judged(child: _Child, code: int) -> Outcome:
    case, folder = child.case, child.folder
    output = (folder / "output").read_text(encoding="utf-8", errors="replace")
    faults = list(_faults(case, code, output, child.killed))
    before, after = (_lines(folder / name) for name in ("before", "after"))
    changed = sorted(line.rpartition(" ")[2] for line in before - after) if after else []
    if case.overwrites:
        changed = [file for file in changed if workbench.METADATA not in file]
    if changed:
        faults.append(f"changed {', '.join(changed[:3])}")
    what = "".join(_lines(folder / "what"))
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(case, what, code, time.monotonic() - child.began, child.peak_gib, tuple(faults), output)


def _faults(case: Case, code: int, output: str, killed: str) -> Iterator[str]:
    if killed:
        yield killed
    elif code not in CODES:
        yield f"exit code {code}"
    lines = output.splitlines()
    if any(line.startswith("Traceback ") for line in lines):
        yield "traceback"
    if unexpected := [line for line in lines if line.startswith("error: unexpected ")]:
        yield unexpected[0][:200]
    if code and not killed and not any(line.startswith("error: ") for line in lines):
        yield "nothing is said"
    if any(len(line) > LONGEST_LINE for line in lines):
        yield f"a line of {max(map(len, lines)):,} characters"


def _lines(file: Path) -> set[str]:
    return set(file.read_text().splitlines()) if file.exists() else set()


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime, proc(5)
    except (OSError, IndexError):
        return 0.0


def _resident_gib(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_GIB
    except (OSError, IndexError):  # it has just ended
        return 0.0
