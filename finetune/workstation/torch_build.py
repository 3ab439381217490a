"""How torch was built, and whether it reaches a GPU, without torch in this process: its import takes seconds, and CUDA
would keep memory of the GPU for as long as a server lives that asks.

This file is also the program that asks torch, so it imports nothing of finetune.
"""

import importlib.util
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0  # with a driver that hangs


def ask() -> Callable[[], dict[str, Any]]:
    """A function that waits for the answer, so that other things are looked at meanwhile.

    `version`, `cuda` (None: a build without), `architectures`, `gpus` that torch reaches, and `error`: why none.
    """
    found = _written_down() | {"architectures": [], "gpus": 0, "error": None}
    if not found["cuda"]:
        return lambda: found
    asked = subprocess.Popen(
        [sys.executable, "-P", __file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return lambda: found | _answer(asked)


def _written_down() -> dict[str, Any]:
    """`version` and `cuda`, by the file that torch's build leaves for this."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (file := folder / "version.py").is_file():
        return {"version": "not installed", "cuda": None}
    found = runpy.run_path(str(file))
    return {"version": found["__version__"], "cuda": found["cuda"]}


def _answer(asked: "subprocess.Popen[str]") -> dict[str, Any]:
    try:
        out, errors = asked.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        asked.kill()
        asked.communicate()
        return {"error": f"no answer within {PATIENCE_S:g} s"}
    if asked.returncode:  # such as a library that is missing
        return {"error": (errors.strip().splitlines() or [f"ended with {asked.returncode}"])[-1]}
    return dict(json.loads(out.splitlines()[-1]))


def _from_torch() -> dict[str, Any]:
    import torch

    found = {"architectures": torch.cuda.get_arch_list(), "gpus": 0, "error": None}
    try:
        torch.cuda.current_device()  # starts CUDA, or says why it can't
        found["gpus"] = torch.cuda.device_count()
    except RuntimeError as error:
        found["error"] = str(error).splitlines()[0]
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_from_torch()) + "\n")
