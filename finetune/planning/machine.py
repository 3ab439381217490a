"""The machine that a plan is made for: the facts of a preset, or what is found here."""

import time
from dataclasses import dataclass, replace
from typing import Any

import yaml

from finetune.config import recipes
from finetune.config.schema import Device, HardwareConfig, Precision
from finetune.errors import ConfigError
from finetune.memory.device import pick_device, resolve_precision
from finetune.run.cores import usable_cores
from finetune.run.progress import plural

GIB = 2.0**30
CUDA_CONTEXT_GIB = 0.5
"""Memory of a process on the GPU outside torch's allocator: 0.4 to 0.6 GiB with CUDA 12 and 13's libraries loaded."""
PYTHON_GIB = 0.6  # of a process with torch, diffusers or transformers imported, before any tensor; assumed
TRIAL_SIDE = 768  # of the matrices whose product measures a CPU, numbers
UNKNOWN_TFLOPS, UNKNOWN_GB_PER_S = 100.0, 1000.0  # of a GPU that no preset knows: seconds then only compare


@dataclass(frozen=True)
class Machine:
    """vram_gib: what a process may take, of the GPU or (on a CPU) of memory. context_gib: of it outside all tensors.

    tflops: dense products in 16 bit and in fp32, peak on a GPU, measured on a CPU. known: whether speeds are facts.
    cpu_gib: free CPU memory of a machine with a GPU; None if unknown, or if there is no GPU.
    """

    name: str
    cuda: bool
    vram_gib: float
    context_gib: float
    bf16: bool
    tflops: float
    fp32_tflops: float
    gb_per_s: float
    pcie_gb_per_s: float
    known: bool
    words: str = ""
    cpu_gib: float | None = None

    def precision(self, wanted: Precision) -> Precision:
        """`auto` resolved. Raises ConfigError for arithmetic that the machine doesn't have."""
        return resolve_precision(wanted, cuda=self.cuda, bf16=self.bf16)


def read(hardware: HardwareConfig) -> Machine:
    """The machine of a configuration: a preset with a GPU's name needs no GPU; anything else is read here.

    Raises ConfigError if CUDA is asked for without a GPU's name and there is none.
    """
    if hardware.gpu:
        return _preset(hardware)
    device = pick_device(hardware.device)
    return _gpu(hardware) if device.type == "cuda" else _cpu(hardware)


def present(hardware: HardwareConfig) -> Machine | None:
    """What counts for models that are loaded now: the GPU that is here, whatever GPU a preset is of; on a CPU the GPU
    of a preset, to see what would fit it, or None."""
    if pick_device(hardware.device).type == "cuda":
        return read(replace(hardware, gpu=""))
    return read(hardware) if hardware.gpu else None


def _preset(hardware: HardwareConfig) -> Machine:
    for key in ("vram_gib", "tflops", "fp32_tflops", "gb_per_s", "pcie_gb_per_s"):
        if getattr(hardware, key) <= 0:
            raise ConfigError(
                f"hardware.{key} must be above 0 where hardware.gpu is set; try a preset such as hardware=rtx4090"
            )
    return Machine(
        hardware.gpu,
        hardware.device is not Device.cpu,
        hardware.vram_gib,
        CUDA_CONTEXT_GIB,
        hardware.bf16,
        hardware.tflops,
        hardware.fp32_tflops,
        hardware.gb_per_s,
        hardware.pcie_gb_per_s,
        known=True,
    )


def _gpu(hardware: HardwareConfig) -> Machine:
    """The GPU of this machine: its free memory now, and the speeds of the preset that bears its name."""
    import psutil
    import torch

    name = torch.cuda.get_device_name()
    free, total = (size / GIB for size in torch.cuda.mem_get_info())
    free = min(total, free + CUDA_CONTEXT_GIB)  # asking has made this process's context
    facts = preset_of(name)
    return Machine(
        name,
        True,
        min(hardware.vram_gib or free, free),
        CUDA_CONTEXT_GIB,
        torch.cuda.is_bf16_supported(including_emulation=False),
        facts.get("tflops", UNKNOWN_TFLOPS),
        facts.get("fp32_tflops", UNKNOWN_TFLOPS / 2),
        facts.get("gb_per_s", UNKNOWN_GB_PER_S),
        facts.get("pcie_gb_per_s", hardware.pcie_gb_per_s),
        known=bool(facts),
        words=f"{free:.1f} of {total:.1f} GiB free now",
        cpu_gib=psutil.virtual_memory().available / GIB,
    )


def _cpu(hardware: HardwareConfig) -> Machine:
    """This machine's processor: CPU memory that is free now, and its speed in a trial of a few milliseconds."""
    import psutil

    free = psutil.virtual_memory().available / GIB
    tflops, gb_per_s = _trial()
    return Machine(
        "CPU",
        False,
        min(hardware.vram_gib or free, free),
        PYTHON_GIB,
        True,
        tflops,
        tflops,
        gb_per_s,
        hardware.pcie_gb_per_s,
        known=True,
        words=f"{plural(usable_cores(), 'core')}, {free:.1f} GiB of memory free now",
    )


def preset_of(name: str) -> dict[str, Any]:
    """The preset of a GPU, by the name that its driver gives."""
    for path in recipes.preset_files()["hardware"].values():
        preset = yaml.safe_load(path.read_text(encoding="utf-8"))
        if preset.get("gpu") == name:
            return dict(preset)
    return {}


def _trial() -> tuple[float, float]:
    """TFLOP/s of a product in fp32, and GB/s of a copy, both as they come out here and now."""
    import torch

    matrix = torch.ones(TRIAL_SIDE, TRIAL_SIDE)
    product = _best(lambda: matrix @ matrix)
    large, other = torch.ones(8 << 20), torch.ones(8 << 20)
    copy = _best(lambda: other.copy_(large))
    return 2 * TRIAL_SIDE**3 / product / 1e12, 2 * large.nbytes / copy / 1e9


def _best(work: Any) -> float:
    """Seconds of the fastest of three runs."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
