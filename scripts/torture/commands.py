"""The real command, in a fork of this process, which has the libraries already, or as a process of its own."""

import atexit
import gc
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from scripts.torture.operations import Operations

LIMIT_S = 150  # many times what a run takes; one that hangs is a fault
POLL_S = 0.005
CRASHED = 70  # exit code of a fork that failed outside the command
OPERATIONS, OUTPUT, MODULES = "operations.log", "output.log", "modules.txt"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL", "hydra", "finetune")
PLAIN = "plain"
PROGRAM = "import sys; from scripts.torture.commands import counted; sys.exit(counted(*sys.argv[1:]))"


def warm(modules: Iterable[str] = ("torch", "diffusers", "transformers", "peft", "finetune.cli")) -> None:
    """Import what a fork would have to. No thread may be started: a fork has only the one that forked."""
    for name in modules:
        if name not in sys.modules and name.partition(".")[0] in LIBRARIES:
            with suppress(Exception):  # modules that exist under other names only
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks would copy half a million objects, and look through them wherever a stage makes room


def run_to_end(work: Path, line: Sequence[str], *, processes: int = 1) -> None:
    """Run a command that must end well. Raises RuntimeError with its last lines."""
    logs = work.parent / f"{work.name}-logs"
    code = run(work, logs, line, processes=processes)
    if code:
        raise RuntimeError(f"{' '.join(line)} ended with {code}: {last_lines(logs)}")


def run(
    work: Path,
    logs: Path,
    line: Sequence[str],
    *,
    processes: int = 1,
    kill_at: int = 0,
    killed_rank: int = 0,
    plain: bool = False,
) -> int:
    """Exit code of a command in its folder: -9 if it was killed, at the operation `kill_at` of one of its processes.

    plain: a program of its own, which imports everything itself, instead of a fork. Raises TimeoutError.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for file in logs.iterdir():
        file.unlink()
    environment, group = {}, 0
    if processes > 1:
        environment = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    started = []
    for rank in range(processes):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        words = [str(logs / f"{rank}-{OPERATIONS}"), str(kill_at if rank == killed_rank else 0), *line]
        started.append(_start(work, logs, [PLAIN, *words] if plain else words, own, str(rank), group))
        group = group or started[0]
    return _ended(started, group)


def last_lines(logs: Path) -> str:
    """The end of what the first process said."""
    text = (logs / f"0-{OUTPUT}").read_text(encoding="utf-8", errors="replace")
    return " | ".join(text.strip().splitlines()[-4:])[-800:]


def _start(work: Path, logs: Path, words: Sequence[str], environment: Mapping[str, str], name: str, group: int) -> int:
    """The process that runs `PROGRAM` with these words, in a process group of its own or in `group`."""
    process = os.fork()
    if process:
        with suppress(PermissionError):  # it was faster, and is another program already
            os.setpgid(process, group or process)
        return process
    code = CRASHED
    try:
        os.setpgid(0, group)
        output = os.open(logs / f"{name}-{OUTPUT}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ.update(environment)
        os.chdir(work)
        if words[0] == PLAIN:
            os.execv(sys.executable, [sys.executable, "-c", PROGRAM, *words[1:]])
        code = counted(*words)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def counted(log: str, kill_at: str, *line: str) -> int:
    """Run `finetune LINE` in this process, its file operations counted."""
    from finetune import cli

    Operations(Path(log), int(kill_at)).start()
    code = cli.main(line)
    Path(log).with_name(MODULES).write_text("\n".join(sys.modules), encoding="utf-8")
    return code


def _ended(processes: Sequence[int], group: int) -> int:
    """The first exit code that is not 0, once all have ended."""
    codes: dict[int, int] = {}
    began = time.monotonic()
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes and (found := os.waitpid(process, os.WNOHANG))[0]:
                codes[process] = os.waitstatus_to_exitcode(found[1])
                if codes[process] == -signal.SIGKILL:  # one that had just begun isn't in the group yet
                    _kill(group)
        if time.monotonic() - began > LIMIT_S:
            _kill(group)
            raise TimeoutError(f"not ended after {LIMIT_S} s")
        time.sleep(POLL_S)
    _kill(group)  # what they started
    return next((code for code in codes.values() if code), 0)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
