"""python -m scripts.torture --kills 1000 --jobs 16: kills the real command, starts it again, and compares.

Small runs of both kinds, the whole line in one process and in two, and each command alone, are killed (SIGKILL) at file
operations that the seed chooses among those of an uninterrupted run, every stage as often as another. The same command
is started until it ends. Then weights, samples, metrics and records must be those of the uninterrupted run, a person's
files as they were, and no other file may be left. Exit code 1 if one trial fails; `--seed S --trial N` repeats it.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scripts.torture import cases, trials

SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def main() -> int:
    arguments = _arguments()
    os.environ.update(SETTINGS)
    from scripts.torture import cases, commands

    commands.warm()
    chosen = [case for case in cases.all_cases() if re.search(arguments.only, case.name)]
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=arguments.work))
    try:
        return _torture(chosen, arguments, folder)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60, help="how many at least (60)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="trials at once; one a core")
    parser.add_argument("--seed", type=int, default=0, help="of the places where it kills (0)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial that would end later")
    parser.add_argument("--only", default="", help="cases whose name fits this expression, such as 'image train$'")
    parser.add_argument("--trial", type=int, help="this one alone, to look at its fault")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    parser.add_argument("--work", type=Path, help="where the runs are; a temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep the runs")
    return parser.parse_args()


def _torture(chosen: list["cases.Case"], arguments: argparse.Namespace, folder: Path) -> int:
    from scripts.torture import cases, commands, trials
    from scripts.torture.jobs import in_forks

    began, longest, kills = time.monotonic(), 0.0, 0
    starts = {(case.kind, case.before): folder / "-".join((case.kind, *case.before)) for case in chosen}
    prepare = [partial(cases.prepare, start, *key) for key, start in starts.items()]
    list(in_forks(prepare, folder, at_once=arguments.jobs))
    run_whole = [partial(trials.reference, case, starts[case.kind, case.before], folder / case.name) for case in chosen]
    wholes = {whole.case.name: whole for whole in in_forks(run_whole, folder, at_once=arguments.jobs)}
    commands.warm(itertools.chain(*(whole.modules for whole in wholes.values())))
    operations = sum(len(rank) for whole in wholes.values() for rank in whole.operations)
    print(f"{len(chosen)} cases, {operations:,} file operations, {time.monotonic() - began:.0f} s", flush=True)

    def waiting() -> Iterator[Callable[[], "trials.Result"]]:
        for number in [arguments.trial] if arguments.trial is not None else itertools.count():
            if arguments.trial is None and (
                kills >= arguments.kills or time.monotonic() - began + longest > arguments.seconds
            ):
                return
            whole = wholes[chosen[number % len(chosen)].name]
            yield partial(trials.trial, whole, number, arguments.seed, folder / f"trial-{number}")

    results = []
    for result in in_forks(waiting(), folder, at_once=arguments.jobs):
        results.append(result)
        kills += result.kills.total()
        longest = max(longest, result.seconds)
        if result.faults:
            _print_fault(result, arguments)
        if not arguments.keep:
            shutil.rmtree(folder / f"trial-{result.number}", ignore_errors=True)
    counts = _counts(results) | {"seed": arguments.seed, "seconds": round(time.monotonic() - began)}
    _print_counts(counts)
    if arguments.out:
        arguments.out.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return int(bool(counts["failed"]))


def _print_fault(result: "trials.Result", arguments: argparse.Namespace) -> None:
    print(
        f"FAULT {result.case}: --seed {arguments.seed} --trial {result.number}"
        + f" --only '{arguments.only}'" * bool(arguments.only)
    )
    print("".join(f"  killed in {place}\n" for place in result.places), end="")
    print("".join(f"  {fault}\n" for fault in result.faults), end="", flush=True)


def _counts(results: list["trials.Result"]) -> dict[str, Any]:
    """For the table and the file: kills by kind and stage, trials by case, faults."""
    by_stage: dict[str, Counter[str]] = {}
    for result in results:
        by_stage.setdefault(result.case.split()[0], Counter()).update(result.kills)
    failed = [
        {"case": r.case, "trial": r.number, "killed in": r.places, "faults": r.faults} for r in results if r.faults
    ]
    return {
        "kills": sum(kinds.total() for kinds in by_stage.values()),
        "ended before their kill": sum(result.missed for result in results),
        "of programs of their own": sum(result.plain for result in results),
        "trials": len(results),
        "trials killed": sum(bool(result.kills) for result in results),
        "by kind and stage": {kind: dict(sorted(stages.items())) for kind, stages in sorted(by_stage.items())},
        "trials by case": dict(sorted(Counter(result.case for result in results).items())),
        "failed": failed,
    }


def _print_counts(counts: dict[str, Any]) -> None:
    stages = sorted({stage for kinds in counts["by kind and stage"].values() for stage in kinds})
    print("| killed in | " + " | ".join(stages) + " |\n|" + "---|" * (len(stages) + 1))
    for kind, found in counts["by kind and stage"].items():
        print(f"| {kind} | " + " | ".join(str(found.get(stage, 0)) for stage in stages) + " |")
    kills, missed = counts["kills"], counts["ended before their kill"]
    print(f"{kills + missed} starts to be killed: {kills} killed, {missed} ended before their kill")
    trials, killed, failed = counts["trials"], counts["trials killed"], len(counts["failed"])
    print(f"{trials} trials, {counts['seconds']} s: {killed} killed, {trials - killed} never, {failed} failed")


if __name__ == "__main__":
    sys.exit(main())
