"""How torch was built, and how many GPUs CUDA shows to a program; without torch, whose import takes seconds.

This file is also the programs that ask, so it imports nothing of finetune. They are processes of their own because a
driver may hang or crash, and because CUDA, once started in a process, works in none that is forked from it.
"""

import ctypes
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0  # with a driver that hangs
DRIVER = "libcuda.so.1"
LIBRARIES = ("libtorch_cuda.so", "libtorch_python.so", "libtorch.so")  # the first that is there tells a build by itself


def ask(memory: Path, *, gpus: bool) -> Callable[[], dict[str, Any]]:
    """A function that waits for the answer, so that other things are looked at meanwhile.

    `version`, `cuda` (None: a build without), `broken`: why it can't be imported (None: it can, or it was not tried),
    `architectures` (empty: unknown), `gpus` that a program can use (None: can't be told), and `error`: why none.

    memory: a file in which the architectures are kept, since torch itself must be imported to be asked for them; a
    build is known by its version and by its library's path, size and time. gpus: whether there are any; else nothing
    is asked about them.
    """
    folder = _folder()
    found = _written_down(folder) | {"broken": None, "architectures": [], "gpus": None, "error": None}
    if folder is None or not found["cuda"] or not gpus:
        return lambda: found
    build = [found["version"], *_stamp(folder)]
    counting = _started("gpus", os.environ)
    if known := _remembered(memory, build):
        return lambda: found | {"architectures": known} | _counted(_answer(counting))
    # Some releases of torch say nothing of their code where a variable hides every GPU.
    shown = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    reading = _started("architectures", shown)

    def wait() -> dict[str, Any]:
        answer, count = _answer(reading), _counted(_answer(counting))
        if "error" in answer:  # such as a library that is missing
            return found | {"broken": answer["error"]} | count
        if answer["architectures"]:
            _remember(memory, build, answer["architectures"])
        return found | answer | count

    return wait


def _folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def _written_down(folder: Path | None) -> dict[str, Any]:
    """`version` and `cuda`, by the file that torch's build leaves for this."""
    if folder is None or not (file := folder / "version.py").is_file():
        return {"version": "not installed", "cuda": None}
    found = runpy.run_path(str(file))
    return {"version": found["__version__"], "cuda": found["cuda"]}


def _stamp(folder: Path) -> list[Any]:
    """Path, size and time of the library."""
    for name in LIBRARIES:
        with suppress(OSError):
            status = (folder / "lib" / name).stat()
            return [str(folder / "lib" / name), status.st_size, status.st_mtime_ns]
    return [str(folder), 0, 0]


def _remembered(memory: Path, build: list[Any]) -> list[str]:
    with suppress(OSError, ValueError, LookupError, TypeError):
        kept = json.loads(memory.read_text(encoding="utf-8"))
        if kept["build"] == build:
            return [str(name) for name in kept["architectures"]]
    return []


def _remember(memory: Path, build: list[Any], architectures: list[str]) -> None:
    with suppress(OSError):  # the next time takes as long again, and nothing else
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps({"build": build, "architectures": architectures}) + "\n", encoding="utf-8")


def _started(question: str, environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    plain = ("-I", "-S") if question == "gpus" else ("-P",)  # without packages Python starts in half the time
    return subprocess.Popen(
        [sys.executable, *plain, __file__, question],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _answer(asked: "subprocess.Popen[str]") -> dict[str, Any]:
    try:
        out, errors = asked.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        asked.kill()
        asked.communicate()
        return {"error": f"no answer within {PATIENCE_S:g} s"}
    if asked.returncode:
        return {"error": (errors.strip().splitlines() or [f"ended with {asked.returncode}"])[-1]}
    return dict(json.loads(out.splitlines()[-1]))


def _counted(answer: dict[str, Any]) -> dict[str, Any]:
    """A driver that hangs or crashes shows no GPU."""
    return {"gpus": 0} | answer


def _gpus() -> dict[str, Any]:
    """How many GPUs CUDA shows here, by the driver's own library. No memory of a GPU is taken: that takes a context."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        return {"gpus": None, "error": str(error)}
    count, text = ctypes.c_int(0), ctypes.c_char_p()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if not status:
        return {"gpus": count.value}
    driver.cuGetErrorString(status, ctypes.byref(text))
    return {"gpus": 0, "error": (text.value or b"").decode(errors="replace") or f"CUDA error {status}"}


def _architectures() -> dict[str, Any]:
    """What torch has code for; no context is started for it."""
    import torch

    return {"architectures": torch.cuda.get_arch_list()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"gpus": _gpus, "architectures": _architectures}[sys.argv[1]]()) + "\n")
