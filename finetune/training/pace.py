"""Notices when steps suddenly take several times as long as before.

On some systems a full GPU lends itself CPU memory without a word, and every step from then on waits for copies; a
second program or heat does the same. A single slow step means nothing.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

from finetune.training.loop import Step

TIMES = 3.0  # as long as before, at least, for each slot: longer rows and other shapes of images stay well below
ROW = 5  # slow steps in a row before anybody is told
LOST_S = 2.0  # seconds that they have cost together: where steps take milliseconds, whatever the machine does is a jump
WARM_UP = 3  # steps that compile, or try which kernels are fast
SHARE = 0.9  # of a GPU's memory, below which drivers lend no CPU memory; assumed
KNOWN, REMEMBERED = 10, 100  # steps before there is something to compare with, and the last ones that are compared with


class Pace:
    """Seconds for each slot of a step (an image, or a place in a row), compared with the median of steps before.

    slow: steps that belonged to such a row, those of an earlier part of the run included. times: how many times as long
    as before the last row took.
    """

    def __init__(self, slow: int) -> None:
        self.slow, self.times = slow, 1.0
        self._forget()

    def note(self, step: Step) -> bool:
        """Take a step in; whether it is the one with which a row of slow steps becomes certain."""
        if step.oom_fallbacks:  # its seconds hold the attempts that failed, and smaller micro-batches take longer
            self._forget()
            return False
        self.seen += 1
        if self.seen <= WARM_UP:
            return False
        rate = step.seconds / step.padded_count
        usual = median(self.rates) if len(self.rates) >= KNOWN else rate
        if rate < TIMES * usual:
            self.rates.append(rate)
            self.row.clear()
            return False
        if self._certain():
            self.slow += 1
            return False
        self.row.append((step.seconds, rate / usual))
        if not self._certain():
            return False
        self.slow += len(self.row)
        self.times = median(times for _, times in self.row)
        return True

    def _certain(self) -> bool:
        lost_s = sum(seconds * (1 - 1 / times) for seconds, times in self.row)
        return len(self.row) >= ROW and lost_s >= LOST_S

    def _forget(self) -> None:
        self.seen = 0
        self.rates: deque[float] = deque(maxlen=REMEMBERED)
        self.row: list[tuple[float, float]] = []


def slowdown_hint(throttle_reasons: Sequence[str], gpu_gib: float) -> str:
    """What makes steps slow, and what to type. burdens: as of `Tracker`; card_gib: the GPU's memory, 0 without one."""
    if not gpu_gib:
        return (
            "another program may be at work on this machine; while it is, "
            "OMP_WAIT_POLICY=PASSIVE in front of the command helps"
        )
    causes = "memory spilling to CPU memory, another program on the GPU, or heat"
    seen = f"the GPU says: {', '.join(throttle_reasons)}" if throttle_reasons else f"likely {causes}"
    return (
        f"{seen}; nvidia-smi lists other programs, hardware.vram_gib={SHARE * gpu_gib:.0f} keeps memory from spilling"
    )
