"""What is found on this machine, as one plain value: it can be printed, kept, and judged later or elsewhere.

None stands for what can't be told here. Nothing is changed, and nothing is written but what torch has code for.
"""

import os
import platform
import resource
import socket
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.reading import at_home
from finetune.run.cores import usable_cores
from finetune.run.room import existing, usage
from finetune.workstation import containers, linux, nvml, torch_build, versions

GIB = 2**30
MANY = 10_000  # files whose rights are asked for within a tenth of a second
FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")
TORCH = "torch.json"  # in `state`
IN_CONTAINER = (Path("/.dockerenv"), Path("/run/.containerenv"))
PLACES = {"outputs": Path("outputs"), "temporary files": Path("/tmp"), "shared memory": Path("/dev/shm")}


def read() -> dict[str, Any]:
    """Every fact, within about a second; with a build of torch for CUDA that is met for the first time, as long as its
    import takes in a program of its own."""
    import psutil

    driver = nvml.read()
    torch = torch_build.ask(state() / TORCH, gpus=bool(driver.get("gpus")))
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "time": time.time(),
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}",
        "container": any(path.exists() for path in IN_CONTAINER),
        "nvml": driver,
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "ram_gib": round(memory.total / GIB, 1),
        "ram_free_gib": round(memory.available / GIB, 1),
        "ram_limit_gib": _scaled(linux.memory_limit(), GIB),
        "swap_gib": round(swap.total / GIB, 1),
        "swap_used_gib": round(swap.used / GIB, 1),
        "swappiness": linux.number(linux.PROC / "sys" / "vm" / "swappiness"),
        "threads": os.cpu_count(),
        "threads_usable": usable_cores(),
        "threads_quota": linux.cpu_quota(),
        "governor": linux.text(FREQUENCY / "scaling_governor"),
        "frequency_driver": linux.text(FREQUENCY / "scaling_driver"),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "open_files_most": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "places": {name: found for name, path in places().items() if (found := _place(path))},
        "clock_synchronized": linux.clock_synchronized(),
        "xids": linux.xids(),
        "containers": containers.read(),
        "packages": versions.read(),
        "hub": hub(),
        "torch": torch(),
        "load": None,
        "records": {},
    }


def state() -> Path:
    """Where doctor remembers. Of the user, not of a folder of runs, because it is about the machine; where such files
    belong by the XDG base directory specification."""
    return at_home(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "finetune"


def hub() -> dict[str, Any]:
    """The cache of downloaded models: whether it can be written and read; whether a token for gated ones is there."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    return {
        "cache": str(cache),
        "writable": os.access(existing(cache), os.W_OK),
        "unreadable": [str(path.relative_to(cache)) for path in _of_models(cache) if not os.access(path, os.R_OK)],
        "token": bool(get_token()),
    }


def _of_models(cache: Path) -> Iterator[Path]:
    """Folders and files of downloaded models, `MANY` at most: those that another user downloaded have his rights."""
    folders = (folder for model in sorted(cache.glob("models--*")) for folder in (model, *sorted(model.glob("*"))))
    files = (path for folder in folders for path in (folder, *(folder.glob("*") if folder.name == "blobs" else ())))
    return islice(files, MANY)


def places() -> dict[str, Path]:
    """Where much is written, by name."""
    from huggingface_hub import constants

    return PLACES | {"downloaded models": Path(constants.HF_HUB_CACHE)}


def _place(path: Path) -> dict[str, Any] | None:
    """The disk that a folder is on, or would be on."""
    import psutil

    found = usage(path)
    if found is None:
        return None
    at = existing(path.absolute())
    mounts = [part for part in psutil.disk_partitions(all=True) if at.is_relative_to(part.mountpoint)]
    mount = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return {
        "path": str(at),
        "free_gib": round(found.free / GIB, 2),
        "size_gib": round(found.total / GIB, 2),
        "file_system": mount and mount.fstype,
        "options": mount and mount.opts,
    }


def processor() -> str:
    """The name of the CPU."""
    lines = (linux.text(linux.PROC / "cpuinfo") or "").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, f"{platform.machine()} CPU")


def _scaled(amount: int | None, unit: float) -> float | None:
    return None if amount is None else round(amount / unit, 1)
