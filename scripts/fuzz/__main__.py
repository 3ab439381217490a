"""Try odd values and damaged files on every command.

    python -m scripts.fuzz --cases 2000 --seed 0 --jobs 2 --out counts.json
    python -m scripts.fuzz --case 417        one case again, with what it printed

A case fails if the command ends with an undocumented exit code, a traceback or an "unexpected" error, says nothing,
takes too long or too much memory, or changes a file that it was given. What was tried stands in docs/reliability.md.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from scripts.fuzz import cases, runner, workbench
from scripts.fuzz.cases import Case
from scripts.fuzz.runner import Outcome


def main(words: Sequence[str] | None = None) -> int:
    """Run the cases that were asked for; 1 if any failed."""
    options = _options(words)
    numbers = options.case or range(options.cases)
    deadline = time.monotonic() + options.seconds
    failed: list[Outcome] = []
    counts: dict[str, Counter[str]] = {}
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="fuzz-") as folder:
        bench = Path(folder, "bench")
        _quietly(bench)
        chosen = _until(deadline, (cases.make(options.seed, number) for number in numbers))
        if options.group:
            chosen = (case for case in chosen if case.group == options.group)
        for outcome in runner.run(chosen, bench, Path(folder), options.jobs):
            counts.setdefault(outcome.case.group, Counter()).update(["cases", f"exit {outcome.code}"])
            if outcome.faults:
                failed.append(outcome)
                counts[outcome.case.group].update(["failed"])
            if outcome.faults or options.case:
                _show(outcome, options.seed, bool(options.case))
            if options.out:  # after every case: hours of them may be stopped
                _write(options.out, options.seed, counts)
    total = sum(count["cases"] for count in counts.values())
    print(f"{total:,} cases, {len(failed):,} failed")
    return 1 if failed else 0


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="how many, from 0")
    parser.add_argument("--case", type=int, action="append", help="this one; may be repeated")
    parser.add_argument("--group", choices=list(cases.GROUPS), help="only cases of this class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="cases at once")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after this time")
    parser.add_argument("--out", type=Path, help="where the counts go, as JSON")
    parser.add_argument("--work", type=Path, help="where the folders of the cases are made")
    return parser.parse_args(words)


def _quietly(bench: Path) -> None:
    """Build the workbench; what its commands print is of interest only where one fails."""
    out, err = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            workbench.build(bench)
        finally:
            sys.stdout, sys.stderr = out, err


def _until(deadline: float, chosen: Iterator[Case]) -> Iterator[Case]:
    for case in chosen:
        if time.monotonic() > deadline:
            return
        yield case


def _write(file: Path, seed: int, counts: Mapping[str, Counter[str]]) -> None:
    rows = {group: dict(sorted(count.items())) for group, count in sorted(counts.items())}
    total = sum(count["cases"] for count in counts.values())
    file.write_text(json.dumps({"seed": seed, "cases": total, "groups": rows}, indent=2) + "\n")


def _show(outcome: Outcome, seed: int, whole: bool) -> None:
    case = outcome.case
    print(f"{case.group}, exit {outcome.code}, {outcome.seconds:.1f} s, {outcome.peak_gib:.1f} GiB: {outcome.what}")
    print(f"  finetune {ascii(shlex.join(case.words))[:300]}")
    for fault in outcome.faults:
        print(f"  FAILED {fault!a}; again: python -m scripts.fuzz --seed {seed} --case {case.number}")
    if whole:
        print("".join(f"  | {ascii(line)[1:-1][:300]}\n" for line in outcome.output.splitlines()[-40:]))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
