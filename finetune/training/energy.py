"""How much energy GPUs take, as NVML says it."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from finetune.run import ranks


class Energy:
    """What the GPUs take: by the counters of NVML, or where there is none by their power at each look."""

    def __init__(self, handles: Sequence[Any]) -> None:
        """handles: NVML's, of the GPUs of this run on this machine."""
        self.handles, self.at = handles, time.monotonic()
        self.joules = [self._counted(handle) for handle in handles]

    def look(self) -> tuple[float, float] | None:
        """Joules and seconds since the last look; None where NVML doesn't answer for every GPU."""
        now, joules = time.monotonic(), [self._counted(handle) for handle in self.handles]
        seconds, before = now - self.at, self.joules
        self.at, self.joules = now, joules
        taken = [
            self._estimated(handle, seconds) if first is None or last is None else last - first
            for handle, first, last in zip(self.handles, before, joules, strict=True)
        ]
        known = [each for each in taken if each is not None]
        return (sum(known), seconds) if known and len(known) == len(taken) else None

    def counted(self) -> float | None:
        """Joules since the drivers were loaded, of all GPUs; None where there is no counter."""
        joules = [self._counted(handle) for handle in self.handles]
        known = [each for each in joules if each is not None]
        return sum(known) if known and len(known) == len(joules) else None

    def _counted(self, handle: Any) -> float | None:
        """Since the driver was loaded, joules; GPUs before Volta have no counter."""
        import pynvml

        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
        except pynvml.NVMLError:
            return None

    def _estimated(self, handle: Any, seconds: float) -> float | None:
        import pynvml

        try:
            return float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1000 * seconds
        except pynvml.NVMLError:
            return None


def gpus_of_the_run(device: torch.device) -> list[torch.device]:
    """Those of all its processes on this machine; none where it has none."""
    if device.type != "cuda" or ranks.world_size() == 1:
        return [device] if device.type == "cuda" else []
    return [torch.device("cuda", number) for number in range(min(ranks.world_size(), torch.cuda.device_count()))]


def handles(gpus: Sequence[torch.device]) -> list[Any]:
    """NVML's; none where it doesn't answer."""
    import pynvml

    if not gpus:
        return []
    try:
        pynvml.nvmlInit()
        # CUDA_VISIBLE_DEVICES renumbers, uuids stay
        uuids = [str(torch.cuda.get_device_properties(each).uuid) for each in gpus]
        return [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
    except pynvml.NVMLError:
        return []
