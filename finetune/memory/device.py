"""Which device and which arithmetic."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finetune.config.schema import Device, Precision
from finetune.errors import ConfigError
from finetune.run import ranks
from finetune.run.progress import say

_turn = threading.RLock()
ALLOCATION_BYTES = 512  # the CUDA caching allocator's smallest block (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)


def allocated_bytes(size: int) -> int:
    """What torch's CUDA allocator takes for a tensor of so many bytes."""
    return -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES


DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def pick_device(wanted: Device) -> torch.device:
    """The device to compute on. Raises ConfigError if CUDA is asked for and not there, or too few GPUs are."""
    if wanted is Device.cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", _own_gpu())
    if wanted is Device.cuda:
        raise ConfigError("hardware.device=cuda, but this torch finds no CUDA GPU; try hardware.device=auto")
    return torch.device("cpu")


def _own_gpu() -> int:
    """The number of the GPU to use: of several processes on one machine, each has its own."""
    if ranks.world_size() > 1:
        local, gpus = ranks.local_rank(), torch.cuda.device_count()
        if local >= gpus:
            raise ConfigError(f"process {local} finds no GPU of its own; start as many as there are GPUs: {gpus}")
        torch.cuda.set_device(local)
    return torch.cuda.current_device()


def pick_precision(wanted: Precision, device: torch.device) -> Precision:
    """`auto` resolved for the device. Raises ConfigError for arithmetic that the device can't do."""
    cuda = device.type == "cuda"
    return resolve_precision(wanted, cuda=cuda, bf16=cuda and torch.cuda.is_bf16_supported(including_emulation=False))


def resolve_precision(wanted: Precision, *, cuda: bool, bf16: bool) -> Precision:
    """`auto` resolved for a CPU, or for a GPU that computes in bf16 or not. Raises ConfigError for fp16 on a CPU."""
    if wanted is Precision.auto:
        return (Precision.bf16 if bf16 else Precision.fp16) if cuda else Precision.fp32
    if wanted is Precision.fp16 and not cuda:
        raise ConfigError("trainer.precision=fp16 needs a CUDA GPU; on a CPU try trainer.precision=fp32")
    return wanted


def pick_dtype(wanted: Precision, device: torch.device) -> torch.dtype:
    """The dtype of frozen weights and activations under that precision."""
    return DTYPES[pick_precision(wanted, device)]


def release_memory() -> None:
    """Give cached device memory back after models or tensors were dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def borrowed(device: torch.device, vram_gib: float) -> Iterator[None]:
    """Inside, at most `vram_gib` GiB of the GPU are taken, torch's global random numbers may be drawn, and new tensors
    are fp32 and have gradients; afterwards all is as the program around us had it.

    All this belongs to the whole process, as does what Accelerate keeps: a second thread waits here for the first.
    """
    gpus = [device] if device.type == "cuda" else []
    with _in_turn(), torch.random.fork_rng(gpus), memory_limit(device, vram_gib), torch.enable_grad():
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def _in_turn() -> Iterator[None]:
    if not _turn.acquire(blocking=False):
        say("waiting for another run in this process to end")
        _turn.acquire()
    try:
        yield
    finally:
        _turn.release()


@contextmanager
def memory_limit(device: torch.device, vram_gib: float) -> Iterator[None]:
    """Let this process take at most `vram_gib` GiB of the GPU while the block runs; 0 leaves the limit as it is."""
    if device.type != "cuda" or not vram_gib:
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    share = usable_bytes(device, vram_gib) / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def usable_bytes(device: torch.device, vram_gib: float) -> float:
    """Bytes that a process may take in all: of the GPU (`vram_gib` GiB of it, 0 is all), or of CPU memory."""
    if device.type != "cuda":
        import psutil

        return float(psutil.virtual_memory().total)
    total = torch.cuda.get_device_properties(device).total_memory
    return min(vram_gib * 2**30, total) if vram_gib else total


def reset_peak(device: torch.device) -> None:
    """Let `peak_gib` count from now on; a CPU's resident set can't."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def gpu_gib(device: torch.device) -> float:
    """Memory of the GPU in all, GiB; 0 without one."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0


def peak_gib(device: torch.device) -> float:
    """Most memory that was in use so far, GiB: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts in KiB
