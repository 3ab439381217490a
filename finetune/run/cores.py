"""The processor cores that this program may use."""

import os


def usable_cores() -> int:
    """A container may have fewer than its machine."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
