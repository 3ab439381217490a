"""What the NVIDIA driver says of its GPUs, as plain values that can be written down and read again.

A GeForce lacks some fields, and so do virtual machines: what the driver does not answer is None, never a guess.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from finetune.workstation import linux

GIB = 2**30
POWER_CAP = "power cap"
THROTTLING = {
    "hardware slowdown": "nvmlClocksEventReasonHwSlowdown",
    "heat (hardware)": "nvmlClocksEventReasonHwThermalSlowdown",
    "heat (driver)": "nvmlClocksEventReasonSwThermalSlowdown",
    "power brake": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
    POWER_CAP: "nvmlClocksEventReasonSwPowerCap",
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

    with opened() as error:
        if error:
            return {"error": error}
        try:
            return {
                "driver": _asked(pynvml.nvmlSystemGetDriverVersion),
                "cuda": _asked(pynvml.nvmlSystemGetCudaDriverVersion),
                "gpus": [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())],
            }
        except pynvml.NVMLError as found:
            return {"error": str(found)}


def fault() -> str:
    """Why nothing should be started on the GPUs of this machine; empty where all is well. For health checks, because
    torch, which takes seconds, isn't needed."""
    found = read()
    gpus = found.get("gpus", [])
    wanted = [f"GPU {gpu['index']}: {gpu['recovery']}" for gpu in gpus if gpu["recovery"]]
    return found.get("error") or ("; ".join(wanted) if gpus else "there is no GPU")


@contextmanager
def opened() -> Iterator[str]:
    """The driver's library, open inside; why it can't be opened, or empty. An open one keeps the GPUs awake: without,
    some drivers reset clocks and fans between two questions."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield str(error)
        return
    try:
        yield ""
    finally:
        pynvml.nvmlShutdown()


def gauges() -> list[dict[str, float | None]]:
    """What changes while a GPU works, by name with its unit, of every GPU; inside `opened`.

    Raises pynvml.NVMLError where the driver no longer answers.
    """
    import pynvml

    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = _asked(pynvml.nvmlDeviceGetHandleByIndex, index)
        gauges = {} if gpu is None else _gauges(gpu)
        lost = all(value is None for value in gauges.values())  # as behind "GPU has fallen off the bus"
        found.append(gauges | {"lost": float(lost)})
    return found


def occupied() -> list[dict[str, Any]]:
    """`{"name", "programs"}` of every GPU, as in `read`; inside `opened`. None of a driver that no longer answers."""
    import pynvml

    found = []
    for index in range(_asked(pynvml.nvmlDeviceGetCount) or 0):
        gpu = _asked(pynvml.nvmlDeviceGetHandleByIndex, index)
        told = (None, None) if gpu is None else (_asked(pynvml.nvmlDeviceGetName, gpu), programs(gpu))
        found.append(dict(zip(("name", "programs"), told, strict=True)))
    return found


def at_work(index: int) -> dict[str, Any]:
    """What a load changes, of one GPU; inside `opened`. A lost GPU answers nothing."""
    import pynvml

    gpu = _asked(pynvml.nvmlDeviceGetHandleByIndex, index)
    if gpu is None:
        return {}
    return {
        "clock_mhz": _asked(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_SM),
        "power_w": _scaled(1e-3, pynvml.nvmlDeviceGetPowerUsage, gpu),
        "temperature_c": _asked(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU),
        "memory_temperature_c": _field(gpu, pynvml.NVML_FI_DEV_MEMORY_TEMP) or None,  # 0 where there is none
        "throttling": _throttling(_asked(pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu)),
        "generation": _asked(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, gpu),
        "width": _asked(pynvml.nvmlDeviceGetCurrPcieLinkWidth, gpu),
    }


def _gauges(gpu: Any) -> dict[str, float | None]:
    import pynvml

    memory = _asked(pynvml.nvmlDeviceGetMemoryInfo, gpu)
    use = _asked(pynvml.nvmlDeviceGetUtilizationRates, gpu)
    reasons = _throttling(_asked(pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu))
    received, sent = pynvml.NVML_PCIE_UTIL_RX_BYTES, pynvml.NVML_PCIE_UTIL_TX_BYTES  # KB in a second, by NVML's header
    return {
        "temperature_celsius": _asked(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU),
        "memory_temperature_celsius": _field(gpu, pynvml.NVML_FI_DEV_MEMORY_TEMP) or None,  # 0 where there is none
        "power_watts": _scaled(1e-3, pynvml.nvmlDeviceGetPowerUsage, gpu),
        "power_limit_watts": _scaled(1e-3, pynvml.nvmlDeviceGetEnforcedPowerLimit, gpu),
        "energy_joules_total": _scaled(1e-3, pynvml.nvmlDeviceGetTotalEnergyConsumption, gpu),
        "utilization_ratio": use and use.gpu / 100,
        "memory_used_bytes": memory and memory.used,
        "memory_size_bytes": memory and memory.total,
        "fan_ratio": _scaled(1e-2, pynvml.nvmlDeviceGetFanSpeed, gpu),
        "clock_hertz": _scaled(1e6, pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_SM),
        "memory_clock_hertz": _scaled(1e6, pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_MEM),
        "pcie_received_bytes_per_second": _scaled(1e3, pynvml.nvmlDeviceGetPcieThroughput, gpu, received),
        "pcie_sent_bytes_per_second": _scaled(1e3, pynvml.nvmlDeviceGetPcieThroughput, gpu, sent),
        "throttled": slowed(gpu),
        "power_capped": None if reasons is None else float(POWER_CAP in reasons),
    }


def slowed(gpu: Any) -> float | None:
    """1 while heat, a power brake or the hardware slows a GPU down, by NVML's handle; a power cap is normal at work."""
    import pynvml

    found = _throttling(_asked(pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu))
    return None if found is None else float(any(reason != POWER_CAP for reason in found))


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
        "processes": programs(gpu),
        "power_limit_w": _scaled(1e-3, pynvml.nvmlDeviceGetEnforcedPowerLimit, gpu),
        "power_default_w": _scaled(1e-3, pynvml.nvmlDeviceGetPowerManagementDefaultLimit, gpu),
        "power_w": _scaled(1e-3, pynvml.nvmlDeviceGetPowerUsage, gpu),
        "temperature_c": _asked(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU),
        "most_clock_mhz": _asked(pynvml.nvmlDeviceGetMaxClockInfo, gpu, pynvml.NVML_CLOCK_SM),
        "throttling": _throttling(_asked(pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu)),
        "pcie": {
            "generation": _asked(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, gpu),
            "width": _asked(pynvml.nvmlDeviceGetCurrPcieLinkWidth, gpu),
            "most_generation": _asked(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, gpu),
            "most_width": _asked(pynvml.nvmlDeviceGetMaxPcieLinkWidth, gpu),
            "card_generation": _asked(pynvml.nvmlDeviceGetGpuMaxPcieLinkGeneration, gpu),
            **_lanes(gpu),
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


def _lanes(gpu: Any) -> dict[str, int | None]:
    """Of the card and of its slot; NVML tells only how many both have."""
    import pynvml

    place = _asked(pynvml.nvmlDeviceGetPciInfo, gpu)
    return linux.lanes(place.busId) if place else {"card_width": None, "slot_width": None}


def _scaled(unit: float, question: Callable[..., Any], *arguments: Any) -> float | None:
    found = _asked(question, *arguments)
    return None if found is None else round(found * unit, 6)


def _throttling(reasons: int | None) -> list[str] | None:
    import pynvml

    if reasons is None:
        return None
    return [name for name, constant in THROTTLING.items() if reasons & getattr(pynvml, constant)]


def programs(gpu: Any) -> list[dict[str, Any]] | None:
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


def _field(gpu: Any, number: int) -> int | None:
    """A value that the driver has under a number."""
    import pynvml

    values = _asked(pynvml.nvmlDeviceGetFieldValues, gpu, [number])
    if not values or values[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    return int(values[0].value.uiVal)


def _recovery(gpu: Any) -> str | None:
    """What the driver wants done before the GPU is used again, in words; empty for nothing."""
    import pynvml

    action = _field(gpu, pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION)
    if action is None:
        return None
    wanted = {getattr(pynvml, f"NVML_GPU_RECOVERY_ACTION_{name}"): words for name, words in RECOVERY.items()}
    return wanted.get(action, f"action {action}" if action else "")
