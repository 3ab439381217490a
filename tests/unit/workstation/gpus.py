"""A driver with one GPU that stands in for NVML: it answers these questions and no others."""

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

GEFORCE: dict[str, Any] = {
    "nvmlInit": None,
    "nvmlShutdown": None,
    "nvmlDeviceGetCount": 1,
    "nvmlDeviceGetHandleByIndex": 0,
    "nvmlSystemGetDriverVersion": "580.95.05",
    "nvmlSystemGetCudaDriverVersion": 13000,
    "nvmlDeviceGetName": "NVIDIA GeForce RTX 4090",
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24 * 2**30, used=2**29),
    "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "nvmlDeviceGetRemappedRows": (0, 0, 1, 0),
}
"""In a virtual machine: names, memory and why it is slow, and nothing else."""
AT_WORK = GEFORCE | {
    "nvmlDeviceGetTemperature": 71,
    "nvmlDeviceGetPowerUsage": 402_123,
    "nvmlDeviceGetEnforcedPowerLimit": 450_000,
    "nvmlDeviceGetTotalEnergyConsumption": 1_234_567,
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=41),
    "nvmlDeviceGetFanSpeed": 62,
    "nvmlDeviceGetClockInfo": 2520,
    "nvmlDeviceGetPcieThroughput": 1500,
    "nvmlDeviceGetFieldValues": [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=88))],
    "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonSwPowerCap,
}


def stand_in(patch: pytest.MonkeyPatch, answers: dict[str, Any]) -> None:
    def refuse(*_: Any) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name in (name for name in dir(pynvml) if name.startswith("nvmlDeviceGet")):
        patch.setattr(pynvml, name, refuse)
    for name, answer in answers.items():
        patch.setattr(pynvml, name, lambda *_, answer=answer: answer)
