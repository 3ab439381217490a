"""What the Linux kernel says of limits, clock, errors and slots; None where it says nothing."""

import ctypes
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PROC, CGROUP, PCI = Path("/proc"), Path("/sys/fs/cgroup"), Path("/sys/bus/pci/devices")
KERNEL_LOG = Path("/dev/kmsg")
UNLIMITED_BYTES = 1 << 60  # cgroups of version 1 write a number of this kind for no limit
UNSYNCHRONIZED_US = 16_000_000  # the error that the kernel counts up to while nobody sets the clock (NTP_PHASE_LIMIT)
RECORD_BYTES = 8192  # of the kernel's log: the longest (Documentation/ABI/testing/dev-kmsg)
XID = re.compile(r"^\d+,\d+,(?P<microseconds>\d+),.*?;NVRM: Xid \((?:PCI:)?(?P<bus>[\da-f:.]+)\): (?P<code>\d+)")


def text(path: Path) -> str | None:
    """What a file of the kernel says."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def number(path: Path) -> int | None:
    """What a file of the kernel says, where that is a number from 0."""
    found = text(path)
    return int(found) if found and found.isdigit() else None


def memory_limit() -> int | None:
    """Bytes that this container, slice or job may take."""
    names = ("memory.max", "memory.limit_in_bytes")
    found = [number(folder / name) for folder in _control_groups("memory") for name in names]
    return min((limit for limit in found if limit is not None and limit < UNLIMITED_BYTES), default=None)


def cpu_quota() -> float | None:
    """CPUs' worth of time that this container, slice or job may take."""
    quotas = []
    for folder in _control_groups("cpu"):
        words = (text(folder / "cpu.max") or "").split()
        words = words or [text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if words[0].isdigit():
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _control_groups(controller: str) -> Iterator[Path]:
    """Those that this process is in, and all above: each may have a limit. In a container only the last are seen."""
    for line in (text(PROC / "self" / "cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = CGROUP / controller if controllers else CGROUP
            inner = Path(path.lstrip("/"))
            yield from (root / folder for folder in (inner, *inner.parents))


class _Timex(ctypes.Structure):
    """The head of `struct timex`; see adjtimex(2)."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("rest", ctypes.c_long * 60),
    )


def clock_synchronized() -> bool | None:
    """Whether something keeps this machine's clock right, whichever program it is; nothing is set."""
    state = _Timex()
    try:
        told = ctypes.CDLL(None).adjtimex(ctypes.byref(state))
    except (OSError, AttributeError):
        return None
    return None if told < 0 else bool(state.maxerror < UNSYNCHRONIZED_US)


def xids() -> list[dict[str, Any]] | None:
    """Errors that the NVIDIA driver wrote into the kernel's log since the machine started; `xids_of`."""
    try:
        log = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # most systems show it to root alone
        return None
    try:
        return xids_of(_records(log), time.clock_gettime(time.CLOCK_MONOTONIC))
    finally:
        os.close(log)


def _records(log: int) -> Iterator[str]:
    while True:
        try:
            record = os.read(log, RECORD_BYTES)
        except BrokenPipeError:  # it was overwritten by newer ones
            continue
        except OSError:  # no more of them
            return
        if not record:
            return
        yield record.decode(errors="replace")


def xids_of(records: Iterable[str], now_s: float) -> list[dict[str, Any]]:
    """`{"bus", "code", "hours_ago"}` of each Xid among records of /dev/kmsg."""
    found = (XID.match(record) for record in records)
    return [
        {
            "bus": xid["bus"],
            "code": int(xid["code"]),
            "hours_ago": round((now_s - int(xid["microseconds"]) / 1e6) / 3600, 1),
        }
        for xid in found
        if xid
    ]


def lanes(bus: str) -> dict[str, int | None]:
    """PCIe lanes that the card at this address has, and the port above it: `{"card_width", "slot_width"}`."""
    domain, _, rest = bus.partition(":")
    card = PCI / f"{int(domain, 16):04x}:{rest.lower()}"
    ends = {"card_width": card, "slot_width": card.resolve().parent}
    widths = {name: number(folder / "max_link_width") for name, folder in ends.items()}
    return {name: width if width and width <= 32 else None for name, width in widths.items()}  # 255: of no link
