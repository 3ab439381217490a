"""What else a machine does while a training takes its steps."""

import mmap
import os
import time
from typing import TYPE_CHECKING

from finetune.run.slow_steps import GPU_PROGRAMS, OTHERS_CPU, SWAPPED_MIB, THROTTLED
from finetune.workstation import linux, nvml

if TYPE_CHECKING:
    import torch

BUSY = ("user", "nice", "system", "irq", "softirq", "steal")  # of psutil's, as far as a system has them


class Meanwhile:
    """Between two looks; see `training.slow_steps.Machine`."""

    def __init__(self, device: "torch.device") -> None:
        """device: that of the training, whose GPU is looked at."""
        self.device = device
        self.start()

    def start(self) -> None:
        """Less than a millisecond."""
        self.began, self.others_s, self.swapped = time.monotonic(), taken_by_others_s(), _swapped_pages()

    def since(self) -> dict[str, float]:
        """By the tags of `run.slow_steps`."""
        began, others_s, swapped = self.began, self.others_s, self.swapped
        self.start()
        whole_s = (self.began - began) * (os.cpu_count() or 1)
        found = {OTHERS_CPU: max(0.0, self.others_s - others_s) / whole_s} | self._gpu()
        if self.swapped is None or swapped is None:
            return found
        return found | {SWAPPED_MIB: (self.swapped - swapped) * mmap.PAGESIZE / 2**20}

    def _gpu(self) -> dict[str, float]:
        from finetune.training.energy import handles

        for handle in handles([self.device] if self.device.type == "cuda" else []):
            slowed, programs = nvml.slowed(handle), nvml.programs(handle)
            pids = {program["pid"] for program in programs or []}
            # In a container the driver may count processes in another way: without our own nobody knows the others.
            others = {GPU_PROGRAMS: float(len(pids) - 1)} if os.getpid() in pids else {}
            return others if slowed is None else others | {THROTTLED: float(slowed)}
        return {}


def taken_by_others_s() -> float:
    """Seconds of the CPUs that other programs, and other virtual machines, have taken since the machine started."""
    import psutil

    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    taken = sum(getattr(times, name, 0.0) for name in BUSY)
    return float(taken - own.user - own.system - own.children_user - own.children_system)


def _swapped_pages() -> int | None:
    """To and from the disk, since the machine started."""
    rows = (row.split() for row in (linux.text(linux.PROC / "vmstat") or "").splitlines())
    found = [int(count) for name, count in rows if name in ("pswpin", "pswpout")]
    return sum(found) if found else None
