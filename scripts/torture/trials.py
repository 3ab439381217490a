"""One trial: a command is killed, started again until it ends, and what it left is compared."""

import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from scripts.torture.cases import Case, persons_files
from scripts.torture.commands import MODULES, OPERATIONS, last_lines, run
from scripts.torture.operations import Operation, read
from scripts.torture.outcome import differences, outcome

PLAIN_SHARE = 0.1  # of the starts that are killed: a process of its own instead of a fork
SECOND_RANK_SHARE = 0.2  # of the kills of two processes
AGAIN_SHARE = 0.35  # of the trials that are killed a second time, and of those a third time


@dataclass(frozen=True)
class Reference:
    """A case that ran without a kill. start: its folder before. operations: of each process. modules: it imported."""

    case: Case
    start: Path
    operations: list[list[Operation]]
    wanted: dict[str, object]
    persons: dict[str, bytes]
    modules: list[str]


@dataclass
class Result:
    """Of one trial. kills: how many by stage, `plain` of them of programs of their own. missed: starts that ended
    before the place of their kill, because less was left to do. faults: in words."""

    case: str
    number: int
    kills: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    plain: int = 0
    missed: int = 0
    seconds: float = 0.0


def reference(case: Case, start: Path, folder: Path) -> Reference:
    """Run a case twice without a kill, from a prepared folder. Raises RuntimeError where it fails or the two differ."""
    found = []
    for number in (1, 2):
        work, logs = folder / f"whole-{number}", folder / f"whole-{number}-logs"
        shutil.copytree(start, work)
        if code := run(work, logs, case.line, processes=case.processes):
            raise RuntimeError(f"{case.name}: ended with {code} without a kill: {last_lines(logs)}")
        found.append(outcome(work))
    if unequal := differences(*found):
        raise RuntimeError(f"{case.name}: differs without a kill: {'; '.join(unequal)}")
    operations = [read(logs / f"{rank}-{OPERATIONS}") for rank in range(case.processes)]
    modules = (logs / MODULES).read_text(encoding="utf-8").split()
    return Reference(case, start, operations, found[0], persons_files(work), modules)


def trial(whole: Reference, number: int, seed: int, folder: Path) -> Result:
    """Kill a case at places that the seed and the number choose, until it ends, and compare."""
    case, result, began = whole.case, Result(whole.case.name, number), time.monotonic()
    choose = random.Random(f"{seed}/{number}")
    work, logs = folder / "work", folder / "logs"
    shutil.copytree(whole.start, work)
    try:
        while True:
            killed = not result.kills or choose.random() < AGAIN_SHARE
            rank, kill_at = _place(whole, choose) if killed else (0, 0)
            plain = killed and choose.random() < PLAIN_SHARE
            code = run(work, logs, case.line, processes=case.processes, kill_at=kill_at, killed_rank=rank, plain=plain)
            if not killed or code != -signal.SIGKILL:
                result.missed += killed
                break
            last = read(logs / f"{rank}-{OPERATIONS}")[-1]
            result.kills[last.stage] += 1
            result.plain += plain
            result.places.append(f"{last.stage}: {last.name} {last.path}")
            _compare_persons_files(whole, work, "after the kill", result)
        if code:
            result.faults.append(f"ended with {code}: {last_lines(logs)}")
        else:
            result.faults += differences(whole.wanted, outcome(work))
            _compare_persons_files(whole, work, "at the end", result)
    except Exception as error:
        result.faults.append(f"{type(error).__name__}: {error}")
    result.seconds = time.monotonic() - began
    return result


def _place(whole: Reference, choose: random.Random) -> tuple[int, int]:
    """A process and the number of one of its operations: every stage is as likely as another."""
    second = len(whole.operations) > 1 and choose.random() < SECOND_RANK_SHARE and bool(whole.operations[1])
    operations = whole.operations[second]
    stage = choose.choice(sorted({operation.stage for operation in operations}))
    numbers = [number for number, operation in enumerate(operations, start=1) if operation.stage == stage]
    return int(second), choose.choice(numbers)


def _compare_persons_files(whole: Reference, work: Path, when: str, result: Result) -> None:
    found = persons_files(work)
    result.faults += [
        f"{name} of the person's was {'changed' if name in found else 'lost'} {when}"
        for name, content in whole.persons.items()
        if found.get(name) != content
    ]
