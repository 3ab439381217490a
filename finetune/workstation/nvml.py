"""What the NVIDIA driver says of its GPUs, as plain values that can be written down and read again.

A GeForce lacks some fields, and so do virtual machines: what the driver does not answer is None, never a guess.
"""

from collections.abc import Callable
from typing import Any

GIB = 2**30
THROTTLING = {
    "hardware slowdown": "nvmlClocksEventReasonHwSlowdown",
    "heat (hardware)": "nvmlClocksEventReasonHwThermalSlowdown",
    "heat (driver)": "nvmlClocksEventReasonSwThermalSlowdown",
    "power brake": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
    "power cap": "nvmlClocksEventReasonSwPowerCap",
}
RECOVERY = {
    "GPU_RESET": "reset the GPU",
    "NODE_REBOOT": "reboot",
    "DRAIN_P2P": "stop what copies between GPUs",
    "DRAIN_AND_RESET": "stop its programs and reset it",
}


def read() -> dict[str, Any]:
    """`{"driver": …, "cuda": …, "gpus": […]}`, or `{"error": why}` where there is no driver that answers."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"error": str(error)}
    try:
        count = pynvml.nvmlDeviceGetCount()
        return {
            "driver": _asked(pynvml.nvmlSystemGetDriverVersion),
            "cuda": _asked(pynvml.nvmlSystemGetCudaDriverVersion),
            "gpus": [_gpu(index) for index in range(count)],
        }
    except pynvml.NVMLError as error:
        return {"error": str(error)}
    finally:
        pynvml.nvmlShutdown()


def _asked(question: Callable[..., Any], *arguments: Any) -> Any:
    """The driver's answer; None where it has none."""
    import pynvml

    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    import pynvml

    gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = _asked(pynvml.nvmlDeviceGetMemoryInfo, gpu)
    rows = _asked(pynvml.nvmlDeviceGetRemappedRows, gpu)
    mig = _asked(pynvml.nvmlDeviceGetMigMode, gpu)
    capability = _asked(pynvml.nvmlDeviceGetCudaComputeCapability, gpu)
    return {
        "index": index,
        "name": _asked(pynvml.nvmlDeviceGetName, gpu),
        "uuid": _asked(pynvml.nvmlDeviceGetUUID, gpu),
        "capability": capability and list(capability),
        "memory_gib": memory and round(memory.total / GIB, 2),
        "used_gib": memory and round(memory.used / GIB, 2),
        "processes": _processes(gpu),
        "power_limit_w": _watts(pynvml.nvmlDeviceGetEnforcedPowerLimit, gpu),
        "power_default_w": _watts(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, gpu),
        "power_w": _watts(pynvml.nvmlDeviceGetPowerUsage, gpu),
        "temperature_c": _asked(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU),
        "throttling": _throttling(_asked(pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu)),
        "pcie": {
            "generation": _asked(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, gpu),
            "width": _asked(pynvml.nvmlDeviceGetCurrPcieLinkWidth, gpu),
            "most_generation": _asked(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, gpu),
            "most_width": _asked(pynvml.nvmlDeviceGetMaxPcieLinkWidth, gpu),
        },
        "ecc_errors": _asked(
            pynvml.nvmlDeviceGetTotalEccErrors,
            gpu,
            pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            pynvml.NVML_VOLATILE_ECC,
        ),
        "remapped_rows": rows and dict(zip(("corrected", "uncorrected", "pending", "failed"), rows, strict=True)),
        "recovery": _recovery(gpu),
        "mig": mig and bool(mig[0]),
    }


def _watts(question: Callable[..., Any], gpu: Any) -> float | None:
    found = _asked(question, gpu)
    return None if found is None else found / 1000


def _throttling(reasons: int | None) -> list[str] | None:
    import pynvml

    if reasons is None:
        return None
    return [name for name, constant in THROTTLING.items() if reasons & getattr(pynvml, constant)]


def _processes(gpu: Any) -> list[dict[str, Any]] | None:
    """Programs that compute on it: process id, name and MiB, the last two None where they aren't told."""
    import psutil
    import pynvml

    found = _asked(pynvml.nvmlDeviceGetComputeRunningProcesses, gpu)
    if found is None:
        return None
    programs = []
    for process in found:
        try:
            name = psutil.Process(process.pid).name()
        except psutil.Error:  # of another container, or ended meanwhile
            name = None
        used = process.usedGpuMemory
        programs.append({"pid": process.pid, "name": name, "mib": used and round(used / 2**20)})
    return programs


def _recovery(gpu: Any) -> str | None:
    """What the driver wants done before the GPU is used again, in words; empty for nothing."""
    import pynvml

    values = _asked(pynvml.nvmlDeviceGetFieldValues, gpu, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if not values or values[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    action = values[0].value.uiVal
    wanted = {getattr(pynvml, f"NVML_GPU_RECOVERY_ACTION_{name}"): words for name, words in RECOVERY.items()}
    return wanted.get(action, f"action {action}" if action else "")
