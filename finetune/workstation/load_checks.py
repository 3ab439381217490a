"""What a machine under load means; see `checks`. Every check says nothing where `load.read` measured nothing."""

from collections.abc import Iterator
from itertools import chain
from statistics import median
from typing import Any

from finetune.workstation import alerts
from finetune.workstation.gpu_checks import REBOOT, SILENT
from finetune.workstation.nvml import POWER_CAP
from finetune.workstation.verdicts import Check, Facts, Verdict, check_of, place_id

LANE_GB_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""Of a PCIe lane, by generation: the PCI-SIG's transfer rate times its coding."""
COPY_SHARE = 0.7  # of the link; its packets leave 0.9 at most, and 0.8 is what GPUs reach
THROTTLED_SHARE = 0.05  # of the samples: a second of twenty. Shorter than that, a load begins or ends
CLOCK_SHARE = 0.5  # of the highest clock: the power limit costs less, a card in an idle state has a tenth
PEAK_SHARE = 0.6  # of the data sheet's rate: what `finetune plan` counts on
DISK_MB_PER_S, DISK_RANDOM_PER_S = 300, 1000  # a hard disk reads 250 and 200 at best, any SSD more


def judge(facts: Facts) -> Iterator[Check]:
    """Every check of the load; none without one."""
    load = facts["load"]
    if load is None:
        return
    gpus = {gpu["index"]: gpu for gpu in facts["nvml"].get("gpus") or []}
    if not load["gpus"]:
        yield Check(
            "gpu-under-load", Verdict.unknown,
            "torch reaches no GPU: its link, copies, clocks, power, heat and speed can't be told",
        )  # fmt: skip
    for gpu in load["gpus"]:
        yield from _gpu(gpu, gpus.get(gpu["index"], {}))
    yield from _cpu(load["cpu"])
    for disk in load["disks"]:
        yield _disk(disk)
    yield from _libraries(load["kernels"], on_gpu=bool(load["gpus"]))


def _gpu(gpu: Facts, known: Facts) -> Iterator[Check]:
    """known: the GPU as NVML describes it; empty where it doesn't."""
    name = gpu_name(gpu)
    yield _products(gpu)
    if gpu["error"]:
        return
    samples: list[Facts] = gpu["samples"]
    yield _speed(gpu, known)
    yield _link(name, samples, known.get("pcie") or {})
    yield _copies(gpu, samples)
    yield _throttling(name, samples)
    yield _clock(name, samples, known.get("most_clock_mhz"))
    yield _heat(f"load-temperature-{name}", _told(samples, "temperature_c"), "GpuWarm")
    yield _heat(f"load-memory-heat-{name}", _told(samples, "memory_temperature_c"), "GpuMemoryHot")


def gpu_name(gpu: Facts) -> int:
    """Its number as NVML counts, as in every other check; torch's where NVML knows no such GPU."""
    return int(gpu["number"] if gpu["index"] is None else gpu["index"])


def _told(samples: list[Facts], name: str) -> list[Any]:
    return [sample[name] for sample in samples if sample.get(name) is not None]


def _products(gpu: Facts) -> Check:
    """Whether it computes at all, and the same each time."""
    wrong = gpu.get("wrong", 0)
    fact = f"{wrong} wrong" if wrong else gpu["error"] or "every product is the same"
    return check_of(
        f"load-products-{gpu_name(gpu)}", None if gpu["full"] else bool(wrong or gpu["error"]), Verdict.bad, fact,
        limit="the same result each time", source="repeated products of the same matrices",
        cost="results are wrong, or runs end with CUDA errors",
        cure=f"{REBOOT}; if it comes again, remove overclocking, check the power cables, have the card replaced",
    )  # fmt: skip


def _speed(gpu: Facts, known: Facts) -> Check:
    from finetune.planning.machine import preset_of

    peak = preset_of(known.get("name") or "").get("tflops")
    return check_of(
        f"load-speed-{gpu_name(gpu)}", None if peak is None else gpu["tflops"] < PEAK_SHARE * peak, Verdict.warn,
        f"{gpu['tflops']:.0f} TFLOP/s in {gpu['dtype']}" + ("" if peak else "; no preset has its data sheet"),
        limit=f"{PEAK_SHARE * peak:.0f} TFLOP/s: {PEAK_SHARE:.0%} of {peak:.0f}" if peak else "",
        source="data sheet, as in conf/hardware", cost="every step takes longer",
        cure="end other programs that use the GPU; then look at throttling, clock and power limit",
    )  # fmt: skip


def _link(name: int, samples: list[Facts], pcie: Facts) -> Check:
    """The best that was seen: between two pieces of work a link may fall."""
    width, generation = max(_told(samples, "width"), default=0), max(_told(samples, "generation"), default=0)
    most_width, most = pcie.get("most_width") or 0, pcie.get("most_generation") or 0
    known = 0 not in (width, generation, most_width, most)
    return check_of(
        f"load-link-{name}", (width < most_width or generation < most) if known else None, Verdict.warn,
        f"x{width}, generation {generation}" if known else SILENT,
        limit=f"x{most_width}, generation {most}" if known else "", source="what both ends can do, by NVML",
        cost="offloaded blocks and batches arrive slower",
        cure="seat the card again, without a riser; look for PCIe speed and ASPM in the firmware",
    )  # fmt: skip


def _copies(gpu: Facts, samples: list[Facts]) -> Check:
    """Against the link as it was: a slow link is a finding of its own."""
    width, generation = max(_told(samples, "width"), default=0), max(_told(samples, "generation"), default=0)
    link, rate = width * LANE_GB_PER_S.get(generation, 0.0), gpu["copy_gb_per_s"]
    return check_of(
        f"load-copies-{gpu_name(gpu)}", rate < COPY_SHARE * link if link else None, Verdict.warn,
        f"{rate:.1f} GB/s from pinned memory",
        limit=f"{COPY_SHARE * link:.1f} GB/s: {COPY_SHARE:.0%} of the link's {link:.1f}" if link else "",
        source="rate and lanes of PCIe", cost="offloaded blocks and batches arrive slower",
        cure="fill all memory channels; on two sockets: numactl --cpunodebind=NODE --membind=NODE, the card's own node",
    )  # fmt: skip


def _throttling(name: int, samples: list[Facts]) -> Check:
    """Holding the power limit is how a GPU works at full load."""
    seen = _told(samples, "throttling")
    shares = {reason: sum(reason in found for found in seen) / len(seen) for reason in dict.fromkeys(chain(*seen))}
    faulty = any(share > THROTTLED_SHARE for reason, share in shares.items() if reason != POWER_CAP)
    power = max(_told(samples, "power_w"), default=None)
    fact = (
        ", ".join(f"{reason} {share:.0%} of the time" for reason, share in shares.items()) or "nothing slowed it down"
    )
    return check_of(
        f"load-throttling-{name}", faulty if seen else None, Verdict.bad,
        (fact + (f", at most {power:.0f} W" if power is not None else "")) if seen else SILENT,
        limit=f"{THROTTLED_SHARE:.0%} of the time; the power cap is allowed", source="NVML's clock event reasons",
        cost="lower clocks: slower steps", cure="clean the fans and check the airflow and the power cables",
    )  # fmt: skip


def _clock(name: int, samples: list[Facts], most: float | None) -> Check:
    clocks = _told(samples, "clock_mhz")
    known = bool(clocks) and most is not None
    return check_of(
        f"load-clock-{name}", median(clocks) < CLOCK_SHARE * (most or 0) if known else None, Verdict.warn,
        f"{median(clocks):.0f} MHz" if clocks else SILENT,
        limit=f"{CLOCK_SHARE * (most or 0):.0f} MHz: {CLOCK_SHARE:.0%} of the highest" if known else "",
        source="the card's highest clock, by NVML", cost="every step takes longer",
        cure=f"sudo nvidia-smi -i {name} -rgc; then check the power cables",
    )  # fmt: skip


def _heat(id_: str, degrees: list[float], rule: str) -> Check:
    limit = next(each.limit for each in alerts.load() if each.name == rule)
    return check_of(
        id_, max(degrees) > limit if degrees else None, Verdict.warn,
        f"{max(degrees):.0f} °C at most" if degrees else f"{SILENT}; many GeForce cards have no such sensor",
        limit=f"{limit:.0f} °C", source=f"the rule {rule} of finetune monitor", cost="soon lower clocks, and wear",
        cure="clean the fans and check the airflow",
    )  # fmt: skip


def _cpu(cpu: Facts) -> Iterator[Check]:
    wrong = cpu.get("wrong", 0)
    fact = f"{wrong} wrong" if wrong else f"{cpu.get('gflops', 0):.0f} GFLOP/s in fp32, the same result each time"
    yield check_of(
        "cpu-products", bool(wrong or cpu["error"]), Verdict.bad, cpu["error"] or fact,
        limit="the same result each time", source="repeated products of the same matrices",
        cost="results are wrong", cure="memtest86+; remove overclocking of processor and memory",
    )  # fmt: skip
    times = cpu["throttled"]
    yield check_of(
        "cpu-throttling", None if times is None else times > 0, Verdict.warn,
        "the kernel does not count it" if times is None else f"{times} times too hot" if times else "never too hot",
        limit="0 times", source="the kernel's count of thermal throttling", cost="kernels are launched more slowly",
        cure="clean the processor's fan and check the airflow",
    )  # fmt: skip


def _disk(disk: Facts) -> Check:
    place, *others = disk["places"]
    id_ = f"read-{place_id(place)}"
    if disk.get("error"):
        return Check(id_, Verdict.unknown, disk["error"])
    slow = disk["mb_per_s"] < DISK_MB_PER_S or disk["random_per_s"] < DISK_RANDOM_PER_S
    return check_of(
        id_, slow, Verdict.warn, f"{disk['mb_per_s']:,} MB/s sequential, {disk['random_per_s']:,} random reads/s"
        + "".join(f"; {other} lie there too" for other in others),
        limit=f"{DISK_MB_PER_S} MB/s and {DISK_RANDOM_PER_S:,} random reads/s", source="below any SSD",
        cost="loading a base takes minutes, and steps wait for images",
        cure="move the folder to an SSD of this machine",
    )  # fmt: skip


def _libraries(kernels: dict[str, dict[str, str]], *, on_gpu: bool) -> Iterator[Check]:
    broken = [why for why in kernels["bitsandbytes"].values() if why]
    yield check_of(
        "bitsandbytes", bool(broken), Verdict.bad if on_gpu else Verdict.warn,
        "; ".join(dict.fromkeys(broken)) or f"{', '.join(kernels['bitsandbytes'])} work", limit="every kind works",
        source="a tiny run of each", cost="no base in 4 or 8 bits, no 8-bit optimiser",
        cure="python -m pip install --force-reinstall --no-deps bitsandbytes",
    )  # fmt: skip
    works = [kind for kind, why in kernels["attention"].items() if not why]
    faults = "; ".join(dict.fromkeys(kernels["attention"].values()))
    yield check_of(
        "attention", not works, Verdict.bad if on_gpu else Verdict.warn,
        f"{', '.join(works)} work{'s' * (len(works) == 1)}" if works else faults,
        limit="at least one fused kernel, right to a rounding", source="a tiny run of each",
        cost="attention takes far more memory and time", cure="install a torch that was built for this GPU",
    )  # fmt: skip
