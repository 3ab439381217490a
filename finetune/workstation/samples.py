"""One look at the machine: every figure that changes, under the name that it has in Prometheus, in base units."""

from collections import defaultdict
from collections.abc import Iterator

from finetune.run import room
from finetune.workstation import facts, nvml

PREFIX = "finetune_"
Sample = dict[str, dict[str, float]]
"""Metric -> which one (number of the GPU, place of the disk; empty for the only one) -> value. What can't be told is
absent."""

METRICS: dict[str, tuple[str, str]] = {
    "finetune_gpu_temperature_celsius": ("gpu", "Temperature of the GPU"),
    "finetune_gpu_memory_temperature_celsius": ("gpu", "Temperature of the GPU's memory"),
    "finetune_gpu_power_watts": ("gpu", "Power that the GPU draws"),
    "finetune_gpu_power_limit_watts": ("gpu", "Power that the GPU may draw"),
    "finetune_gpu_energy_joules_total": ("gpu", "Energy that the GPU took since the driver was loaded"),
    "finetune_gpu_utilization_ratio": ("gpu", "Share of the time in which a kernel ran"),
    "finetune_gpu_memory_used_bytes": ("gpu", "GPU memory in use"),
    "finetune_gpu_memory_size_bytes": ("gpu", "GPU memory"),
    "finetune_gpu_fan_ratio": ("gpu", "Speed of the fan, of its highest"),
    "finetune_gpu_clock_hertz": ("gpu", "Clock of the multiprocessors"),
    "finetune_gpu_memory_clock_hertz": ("gpu", "Clock of the GPU's memory"),
    "finetune_gpu_pcie_received_bytes_per_second": ("gpu", "What the GPU receives over PCIe"),
    "finetune_gpu_pcie_sent_bytes_per_second": ("gpu", "What the GPU sends over PCIe"),
    "finetune_gpu_throttled": ("gpu", "1 while heat, a power brake or the hardware slows the GPU down"),
    "finetune_gpu_power_capped": ("gpu", "1 while the power limit holds the clocks down"),
    "finetune_gpu_lost": ("gpu", "1 while the GPU answers no question of the driver"),
    "finetune_cpu_utilization_ratio": ("", "Share of the CPUs' time in use since the last look"),
    "finetune_cpu_temperature_celsius": ("sensor", "Temperature of the CPU, the hottest of a sensor chip"),
    "finetune_memory_available_bytes": ("", "CPU memory that programs can still get"),
    "finetune_memory_size_bytes": ("", "CPU memory"),
    "finetune_swap_used_bytes": ("", "Memory that was moved to disk"),
    "finetune_disk_free_bytes": ("place", "Free space on the disk of a place"),
    "finetune_disk_size_bytes": ("place", "Size of the disk of a place"),
    "finetune_disk_read_bytes_total": ("", "Read from all disks since the machine started"),
    "finetune_disk_written_bytes_total": ("", "Written to all disks since the machine started"),
}
"""Name -> the label that tells several apart, and what it is. The unit is in the name, as Prometheus has it."""
DISKS = ("outputs", "downloaded models")  # of `facts.places`: those that fill up
CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")


def look() -> Sample:
    """The machine now; its GPUs only inside `nvml.opened`. The first look has no CPU utilization: it is of a time."""
    found: Sample = defaultdict(dict)
    for name, which, value in (*_gpus(), *_machine(), *_disks()):
        if value is not None:
            found[PREFIX + name][which] = value
    return dict(found)


def missing(sample: Sample) -> list[str]:
    """Metrics that can't be told here."""
    return [name for name in METRICS if name not in sample]


def _gpus() -> Iterator[tuple[str, str, float | None]]:
    import pynvml

    try:
        for number, gauges in enumerate(nvml.gauges()):
            yield from ((f"gpu_{name}", str(number), value) for name, value in gauges.items())
    except pynvml.NVMLError:  # no driver, or one that answers no longer
        return


def _machine() -> Iterator[tuple[str, str, float | None]]:
    import psutil

    memory, moved = psutil.virtual_memory(), psutil.disk_io_counters()
    yield "cpu_utilization_ratio", "", psutil.cpu_percent() / 100
    for sensor, rows in psutil.sensors_temperatures().items():
        if sensor in CPU_SENSORS:
            yield "cpu_temperature_celsius", sensor, max(row.current for row in rows)
    yield "memory_available_bytes", "", memory.available
    yield "memory_size_bytes", "", memory.total
    yield "swap_used_bytes", "", psutil.swap_memory().used
    if moved is not None:
        yield "disk_read_bytes_total", "", moved.read_bytes
        yield "disk_written_bytes_total", "", moved.write_bytes


def _disks() -> Iterator[tuple[str, str, float | None]]:
    places = facts.places()
    for place in DISKS:
        usage = room.usage(places[place])
        yield "disk_free_bytes", place, usage and usage.free
        yield "disk_size_bytes", place, usage and usage.total
