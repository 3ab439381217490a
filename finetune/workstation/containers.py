"""Whether containers of this machine can use its GPUs, judged by the files that this takes."""

import shutil
from pathlib import Path
from typing import Any

ENGINES = ("docker", "podman")
HOOKS = ("nvidia-container-runtime-hook", "nvidia-container-runtime")  # of the NVIDIA Container Toolkit
DEVICE_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
"""Of the Container Device Interface, where files describe devices: the toolkit writes one for GPUs."""


def read() -> dict[str, Any]:
    """`{"engines": […], "gpu_support": …}`."""
    described = any("nvidia" in path.name for folder in DEVICE_FOLDERS if folder.is_dir() for path in folder.iterdir())
    return {
        "engines": [name for name in ENGINES if shutil.which(name)],
        "gpu_support": described or any(shutil.which(hook) for hook in HOOKS),
    }
