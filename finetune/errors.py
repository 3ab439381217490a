"""What can go wrong, as a tree; each class has an exit code of its own.

    FinetuneError            1  anything else that was foreseen
    ├── ConfigError          2  a recipe, key or value
    ├── DataError            3  images, captions, data folders
    ├── ModelError           4  a base model or adapter that can't be found, read or used
    ├── OutOfMemory          5  the GPU (or the host) is too small for the settings
    ├── RunError             6  the run folder: in use, unwritable, full, changed, damaged
    ├── TrainingError        7  the optimisation itself failed (non-finite steps)
    ├── ExportError          8  an exported adapter does not reproduce the trained one
    └── Interrupted    130, 143 SIGINT or SIGTERM; the state was saved first

A message says what, where, what is allowed and what to type.
"""

import sys

# What errors of other classes say: CUDA outside torch's allocator and CUDA's libraries, and torch's allocator on a CPU.
GPU_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
GPU_FAILURE = ("CUDA error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "cuDNN error", "HIP error", "NCCL error")
"""What errors of a GPU, its driver or its libraries say, whatever was computed."""


class FinetuneError(Exception):
    """Base of every error that a person can act on; the CLI prints it as one line."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback, which would tell a person nothing."""
        return [f"{type(self).__name__}: {line}" for line in str(self).splitlines()]


class ConfigError(FinetuneError):
    """A recipe, key or value is wrong."""

    exit_code = 2


class DataError(FinetuneError):
    """Images, captions or their folder are unusable."""

    exit_code = 3


class ModelError(FinetuneError):
    """A base model or adapter can't be found, read or used."""

    exit_code = 4


class OutOfMemory(FinetuneError):
    """The device is too small for the settings."""

    exit_code = 5


class RunError(FinetuneError):
    """The run folder is in use, unwritable, full, changed or damaged."""

    exit_code = 6


class TrainingError(FinetuneError):
    """The optimisation failed."""

    exit_code = 7


class ExportError(FinetuneError):
    """An exported adapter does not reproduce the trained module."""

    exit_code = 8


class Interrupted(FinetuneError):
    """A signal stopped the run after its state was saved.

    signal_number: the signal; the exit code is 128 + that number (130 for SIGINT, 143 for SIGTERM).
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[str, int]]:
        return type(self), (str(self), self.exit_code - 128)  # from a worker's process to ours


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host ran out: in torch's allocator, in CUDA's libraries, in torch's on a CPU, in Python."""
    return is_gpu_out_of_memory(error) or isinstance(error, MemoryError) or CPU_OUT_OF_MEMORY in str(error)


def is_gpu_out_of_memory(error: BaseException) -> bool:
    """Whether it was the GPU, so that the host may have room."""
    torch = sys.modules.get("torch")  # whoever ran out of torch's memory has imported it
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in GPU_OUT_OF_MEMORY)


def is_gpu_failure(error: BaseException) -> bool:
    """Whether a GPU, its driver or its libraries failed: no file is to blame."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.AcceleratorError):
        return True
    return any(words in str(error) for words in GPU_FAILURE)
