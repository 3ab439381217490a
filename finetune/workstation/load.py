"""The machine at work, as one plain value like `facts`: products on each processor, copies, disks, libraries.

N rows and columns of a square matrix
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from finetune.errors import is_gpu_out_of_memory
from finetune.run import room
from finetune.run.plain import first_line
from finetune.run.progress import progress, say
from finetune.workstation import disk_speed, facts, kernels, linux, nvml
from finetune.workstation.meanwhile import taken_by_others_s

if TYPE_CHECKING:
    import torch

SAMPLE_S = 0.1
COPY_BYTES, COPY_S = 256 << 20, 2.0
GPU_SIDE, CPU_SIDE = 8192, 1024  # large enough that a product is limited by arithmetic, small beside the memory
ROUNDING, ROUNDING_16 = 1e-4, 1e-2  # of the largest result: libraries may sum in another order when threads are taken
BATCH_S = 0.25  # between two looks at the clock
DISKS = ("outputs", "downloaded models")  # of `facts.places`: those that training reads
THROTTLED = "devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"  # of Intel's processors


def read(seconds: float, found: dict[str, Any]) -> dict[str, Any]:
    """Work for so many seconds on the CPU, and then on each GPU. found: what `facts.read` says of the machine."""
    import torch

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    each = f" and {seconds:g} s on {'the GPU' if len(gpus) == 1 else f'each of {len(gpus)} GPUs'}" if gpus else ""
    say(f"libraries and disks first, then {seconds:g} s on the CPU{each}")
    loaded: dict[str, Any] = {"seconds": seconds, "gpus": []}
    began, others = time.perf_counter(), taken_by_others_s()
    with progress("load", 3 + len(gpus), unit="measurements") as shown:
        device = torch.device("cuda", 0) if gpus else torch.device("cpu")
        loaded["kernels"] = kernels.read(device)
        shown.advance()
        loaded["disks"] = _disks()
        shown.advance()
        loaded["cpu"] = _cpu(seconds)
        shown.advance()
        for number in gpus:
            loaded["gpus"].append(of_gpu(number, seconds, found["nvml"].get("gpus") or []))
            shown.advance()
    whole_s = (time.perf_counter() - began) * (os.cpu_count() or 1)
    return loaded | {"busy": round(max(0.0, taken_by_others_s() - others) / whole_s, 2)}


def _disks() -> list[dict[str, Any]]:
    """How fast each disk reads; places: what lies on it."""
    found: dict[int, dict[str, Any]] = {}
    for name in DISKS:
        folder = room.existing(facts.places()[name].absolute())
        disk = folder.stat().st_dev
        if disk not in found:
            found[disk] = {"places": []} | disk_speed.read(folder)
        found[disk]["places"].append(name)
    return list(found.values())


def _cpu(seconds: float) -> dict[str, Any]:
    import torch

    cpu: dict[str, Any] = {"name": facts.processor(), "threads": torch.get_num_threads()}
    throttled = _throttle_count()
    try:
        rates, wrong = products(torch.device("cpu"), torch.float32, CPU_SIDE, seconds)
        cpu |= {"gflops": round(median(rates) / 1e9, 1), "wrong": wrong, "error": None}
    except Exception as error:  # the other figures stay
        cpu |= {"error": first_line(error)}
    after = _throttle_count()
    return cpu | {"throttled": None if throttled is None or after is None else after - throttled}


def _throttle_count() -> int | None:
    """How often heat has slowed down a core since the machine started."""
    counts = [linux.number(path) for path in Path("/sys").glob(THROTTLED)]
    return sum(count for count in counts if count is not None) if counts else None


def of_gpu(number: int, seconds: float, known: list[dict[str, Any]]) -> dict[str, Any]:
    """One GPU under load. known: the GPUs of NVML, which counts them in another order than torch."""
    import torch

    from finetune.config.schema import Precision
    from finetune.memory.device import pick_dtype

    device = torch.device("cuda", number)
    gpu: dict[str, Any] = {"index": None, "number": number, "uuid": None, "dtype": None, "samples": []}
    try:
        gpu["uuid"] = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        gpu["index"] = next((one["index"] for one in known if one["uuid"] == gpu["uuid"]), None)
        dtype = pick_dtype(Precision.auto, device)
        gpu["dtype"] = str(dtype).removeprefix("torch.")
        with torch.cuda.device(device), sampled(gpu["index"]) as gpu["samples"]:
            gpu["copy_gb_per_s"] = round(median(copies(device)) / 1e9, 2)
            rates, wrong = products(device, dtype, GPU_SIDE, seconds)
            gpu |= {"tflops": round(median(rates) / 1e12, 2), "wrong": wrong, "error": None, "full": False}
            torch.cuda.empty_cache()
    except Exception as error:  # also of another program's making: the memory may be full
        gpu |= {"error": first_line(error), "full": is_gpu_out_of_memory(error)}
    return gpu


def products(device: "torch.device", dtype: "torch.dtype", side: int, seconds: float) -> tuple[list[float], int]:
    """Multiply square matrices for so long: operations a second, several times, and how many results were wrong.

    The same product gives the same each time, up to rounding; another result is an error of the hardware.
    """
    import torch

    random = torch.Generator().manual_seed(0)
    left_NN, right_NN = (torch.randn(side, side, generator=random).to(device, dtype) for _ in range(2))
    expected_NN = left_NN @ right_NN
    found_NN = torch.empty_like(expected_NN)
    noise = (ROUNDING if dtype is torch.float32 else ROUNDING_16) * float(expected_NN.abs().max())

    def multiply(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            torch.matmul(left_NN, right_NN, out=found_NN)
        _wait(device)
        return time.perf_counter() - began

    multiply(1)
    times = max(1, int(BATCH_S / multiply(1)))
    rates: list[float] = []
    wrong, end = 0, time.perf_counter() + seconds
    while not rates or time.perf_counter() < end:
        rates.append(2 * side**3 * times / multiply(times))
        wrong += not torch.allclose(found_NN, expected_NN, rtol=0, atol=noise)
    return rates, wrong


def copies(device: "torch.device") -> list[float]:
    """Bytes a second from pinned memory to the device, several times."""
    import torch

    pinned = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(pinned, device=device)
    rates: list[float] = []
    end = time.perf_counter() + COPY_S
    while not rates or time.perf_counter() < end:
        began = time.perf_counter()
        target.copy_(pinned, non_blocking=True)
        _wait(device)
        rates.append(COPY_BYTES / (time.perf_counter() - began))
    return rates


def _wait(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def sampled(index: int | None) -> Iterator[list[dict[str, Any]]]:
    """What NVML says of a GPU while the block runs, every tenth of a second."""
    samples: list[dict[str, Any]] = []
    if index is None:
        yield samples
        return
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(SAMPLE_S):
            samples.append(nvml.at_work(index))

    with nvml.opened():
        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield samples
        finally:
            ended.set()
            watcher.join()
