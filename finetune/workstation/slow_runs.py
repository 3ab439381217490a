"""Slow steps of the runs that train meanwhile, as alerts: what the trainer noted in their curves."""

from collections.abc import Iterator
from pathlib import Path

from finetune.reporting import curves
from finetune.run import rundir, slow_steps
from finetune.run.hashing import Stamp, stamp_of
from finetune.run.records import METRICS
from finetune.workstation.alerts import Alert, Rule, Severity

RULE = Rule(
    "SlowStep",
    metric=slow_steps.SECONDS,
    above=True,
    limit=0.0,
    for_s=0.0,
    severity=Severity.warning,
    summary="a step took many times the usual",
)


class SlowRuns:
    """The runs of a folder that are at work and whose curves grow: one that only draws samples does not train."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[Path, Stamp] = {}
        self.told: set[tuple[Path, str]] = set()

    def see(self) -> Iterator[Alert]:
        """What is new since the last look; each slow step once."""
        try:
            runs = sorted(self.folder.iterdir())
        except OSError:  # there is none yet, or it is somebody else's
            return
        for run in runs:
            if self._trains(run):
                for line in slow_steps.lines(curves.read(run)):
                    if (run, line) not in self.told:
                        self.told.add((run, line))
                        yield Alert(RULE, run.name, None, firing=True, words=line)

    def _trains(self, run: Path) -> bool:
        """Whether its curves have changed since the last look; of the first one nobody knows."""
        try:
            stamp = stamp_of(run / METRICS)
        except OSError:
            return False
        before, self.known[run] = self.known.get(run, stamp), stamp
        return stamp != before and rundir.is_held(run)
