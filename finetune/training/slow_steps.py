"""Notices a step that takes many times the usual, and asks what the machine did meanwhile."""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Protocol

from finetune.run import slow_steps
from finetune.run.progress import say
from finetune.training.loop import Step

KEPT, LEAST = 32, 10  # steps that the usual is the middle of; the first ones compile, and fill caches
TIMES, MORE_S = 4.0, 2.0  # the usual, and seconds above it: less is hardly worth a line


class Machine(Protocol):
    """What else happens on the machine; `workstation.meanwhile` has it."""

    def start(self) -> None:
        """Count from now on."""
        ...

    def since(self) -> Mapping[str, float]:
        """What happened since, by the tags of `run.slow_steps`, and count from now on."""
        ...


class SlowSteps:
    """Compares each step with those before it; the machine is asked at a slow one alone."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.recent: deque[float] = deque(maxlen=KEPT)  # seconds for an image or token, padding included
        self.noted: set[str] = set()

    def see(self, step: Step) -> dict[str, float]:
        """What its row of curves should have besides: nothing, or why it was slow where that is new in this run."""
        usual_s = median(self.recent) * step.padded_count if len(self.recent) >= LEAST else step.seconds
        self.recent.append(step.seconds / step.padded_count)
        if step.oom_fallbacks or step.seconds < TIMES * usual_s or step.seconds - usual_s < MORE_S:
            return {}
        times = {slow_steps.SECONDS: step.seconds, slow_steps.USUAL_S: usual_s}
        values = times | dict(self.machine.since())
        causes = set(slow_steps.causes(values)) or {"unknown"}
        if causes <= self.noted:
            return {}
        self.noted |= causes
        say(slow_steps.line(step.number, values))
        return values
