"""What this machine measured under load before, and whether it is slower now: a line of JSON a load."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.reading import read_text
from finetune.run.progress import say
from finetune.workstation.facts import state
from finetune.workstation.gpu_checks import IDLE_GIB
from finetune.workstation.load_checks import gpu_name
from finetune.workstation.verdicts import Check, Facts, Verdict, check_of, place_id

BUSY = 0.1  # of the CPUs: more than a desktop takes that nobody uses
ALIKE = 0.005  # less is 0 %
STEADY, SHAKY = 0.10, 0.30
"""How much slower than the record is a finding, of processors and links, and of disks. A choice: `finetune bench` takes
5 % of short work for chance, a disk's rate depends on what is on it, and 12 % should be found."""


@dataclass(frozen=True)
class Figure:
    """One speed. id: of its check. key: what was measured on which part of the machine, the same each time. disturbed:
    what else was at work, so that a low figure says nothing; empty for nothing."""

    id: str
    key: str
    value: float
    unit: str
    scatter: float
    disturbed: str


def file() -> Path:
    """Of every load on this machine."""
    return state() / "doctor.jsonl"


def figures(facts: Facts) -> Iterator[Figure]:
    """The speeds of a load that was measured."""
    load, known = facts["load"], {gpu["index"]: gpu for gpu in facts["nvml"].get("gpus") or []}
    busy = f"others took {load['busy']:.0%} of the CPUs" if load["busy"] > BUSY else ""
    for gpu in load["gpus"]:
        if not gpu["error"]:
            yield from _of_gpu(gpu, load["seconds"], known.get(gpu["index"], {}).get("used_gib"), busy)
    cpu = load["cpu"]
    which = f"products of {load['seconds']:g} s, {cpu['name']}, {cpu['threads']} threads"
    if not cpu["error"]:
        yield Figure("cpu", which, cpu["gflops"], "GFLOP/s", STEADY, busy)
    for disk in load["disks"]:
        if disk.get("error"):
            continue
        place = disk["places"][0]
        name, which = place_id(place), f"{place} by {disk['way']}, {facts['places'][place]['size_gib']} GiB"
        yield Figure(f"read-{name}", f"sequential, {which}", disk["mb_per_s"], "MB/s", SHAKY, busy)
        yield Figure(f"random-{name}", f"at random, {which}", disk["random_per_s"], "random reads/s", SHAKY, busy)


def _of_gpu(gpu: Facts, seconds: float, used_gib: float | None, busy: str) -> Iterator[Figure]:
    name = gpu_name(gpu)
    shared = "others used the GPU" if used_gib is not None and used_gib > IDLE_GIB else ""
    which = f"{gpu['dtype']} products of {seconds:g} s, {gpu['uuid']}"  # a longer load is a hotter one
    yield Figure(f"speed-{name}", which, gpu["tflops"], "TFLOP/s", STEADY, shared)
    yield Figure(f"copies-{name}", f"copies to {gpu['uuid']}", gpu["copy_gb_per_s"], "GB/s", STEADY, shared or busy)


def judge(facts: Facts) -> Iterator[Check]:
    """Every speed of a load against the best that was written down."""
    if facts["load"] is not None:
        for figure in figures(facts):
            yield _against(facts["records"].get(figure.key), figure, versions(facts))


def _against(best: dict[str, Any] | None, figure: Figure, now: dict[str, str]) -> Check:
    id_, fact = f"slower-{figure.id}", f"{_short(figure.value)} {figure.unit}"
    if best is None:
        return Check(id_, Verdict.unknown, f"{fact}, measured for the first time")
    less = 1 - figure.value / best["value"]
    then = f"{_short(best['value'])} on {time.strftime('%Y-%m-%d', time.localtime(best['time']))}"
    then += "".join(f", with {name} {was}" for name, was in best["versions"].items() if was != now.get(name))
    faulty = less > figure.scatter
    doubtful = faulty and bool(figure.disturbed)
    against = f"the best so far; {then}" if less <= 0 else f"{less:.0%} slower than {then}"
    return check_of(
        id_, None if doubtful else faulty, Verdict.warn,
        f"{fact}, {f'as fast as {then}' if 0 < less < ALIKE else against}"
        + (f"; {figure.disturbed}" if doubtful else ""),
        limit=f"at most {figure.scatter:.0%} slower than ever before", source=str(file()),
        cost="everything takes longer than it did",
        cure="compare heat, clocks, power limit, link and versions with then",
    )  # fmt: skip


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def records() -> dict[str, dict[str, Any]]:
    """Key of each figure -> the best `value` that was written down, its `time` and `versions`. A line that is cut off
    or of another form counts as none."""
    try:
        lines = read_text(file()).splitlines()
    except (OSError, ValueError):
        return {}
    best: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            for key, value in row["figures"].items():
                if value > best.get(key, {"value": 0})["value"]:
                    best[key] = {"value": value, "time": float(row["time"]), "versions": dict(row["versions"])}
        except (ValueError, TypeError, LookupError, AttributeError):
            continue
    return best


def add(facts: Facts) -> None:
    """Write down what a load measured."""
    row = {
        "time": facts["time"],
        "host": facts["host"],
        "versions": versions(facts),
        "figures": {figure.key: figure.value for figure in figures(facts)},
    }
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        with open(file(), "a", encoding="utf-8") as log:
            log.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        say(f"warning: cannot write {file()} ({error.strerror}); the next load can't be compared with this one")


def versions(facts: Facts) -> dict[str, str]:
    """What else may change a speed."""
    return {"torch": str(facts["torch"]["version"]), "driver": str(facts["nvml"].get("driver") or "none")}
