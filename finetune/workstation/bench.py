"""`finetune bench`: how fast this machine trains, writes text and draws images, and whether it was faster before."""

import argparse
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError
from finetune.reading import at_home, read_text
from finetune.run.plain import UNREADABLE, first_line, from_plain
from finetune.run.progress import plural, progress
from finetune.run.receipts import versions
from finetune.workstation.facts import processor
from finetune.workstation.flags import Flags

if TYPE_CHECKING:
    from finetune.workstation.measuring import Speed

REPEATS = 5
BUSY = 0.5
ARTICLE = {
    "sd21-512px-plain": 3.8,
    "sd21-512px-efficient": 2.9,
    "llama2_7b-fp16-pp256": 210.0,
    "llama2_7b-fp16-tg128": 48.0,
    "llama2_7b-int8-pp256": 180.0,
    "llama2_7b-int8-tg128": 57.0,
}
"""Of an RTX 4090, as an article on such a workstation gives them; lengths of prompts it does not say."""
NOISE = 0.05  # of the median: smaller changes are not told from chance, even where no repeat of both is alike


@dataclass(frozen=True)
class Figure:
    """A median with its lowest and highest repeat, in `unit`."""

    unit: str
    more_is_better: bool
    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class Benchmark:
    """What was measured where, and by which versions. figures: by id. failed: measurement -> its error. time: seconds
    since 1970. load: how many programs wanted a CPU in the minute before; above `BUSY` the figures are those of a busy
    machine."""

    time: float
    load: float
    host: str
    device: str
    threads: int
    versions: dict[str, str]
    figures: dict[str, Figure]
    failed: dict[str, str] = field(default_factory=dict)


def main(words: Sequence[str]) -> int:
    """Print a table, or JSON; the exit code is 1 where a measurement failed, or something is slower than in the file to
    compare with, else 0.

    Raises ConfigError for other words and for a file that can't be compared.
    """
    parser = Flags("bench")
    parser.add_argument("--repeats", metavar="NUMBER", type=_repeats, default=REPEATS)
    parser.add_argument("--compare", metavar="FILE", default="")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    before = load(at_home(options.compare)) if options.compare else None
    found = bench(options.repeats)
    print(json.dumps(asdict(found), indent=1) if options.json else table(found, before))
    slower = before is not None and "slower" in {change(before, found, id_) for id_ in found.figures}
    return int(slower or bool(found.failed))


def bench(repeats: int = REPEATS) -> Benchmark:
    """Measure everything; a minute or two on two cores. What fails is said, and costs the others nothing."""
    import torch

    from finetune.workstation.speeds import every_measurement

    load_before = os.getloadavg()[0]
    figures, failed, measurements = dict[str, Figure](), dict[str, str](), every_measurement()
    with progress("bench", len(measurements), unit="measurements") as shown:
        for name, measure in measurements.items():
            try:
                for speed in measure(repeats):
                    figures[speed.id] = _figure(speed)
            except Exception as error:
                failed[name] = first_line(error)
            shown.advance()
    return Benchmark(
        time=time.time(),
        load=round(load_before, 1),
        host=socket.gethostname(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        threads=torch.get_num_threads(),
        versions=versions(),
        figures=figures,
        failed=failed,
    )


def load(file: Path) -> Benchmark:
    """What `finetune bench --json` printed. Raises ConfigError for anything else."""
    try:
        return from_plain(Benchmark, json.loads(read_text(file)))
    except UNREADABLE as error:
        way = f"make one with: finetune bench --json > {file}"
        raise ConfigError(f"cannot compare with {file} ({first_line(error)}); {way}") from error


def change(before: Benchmark, now: Benchmark, id_: str) -> str:
    """ "slower" or "faster" where no repeat of one is alike to one of the other, and the medians differ by more than
    `NOISE`; "same" otherwise, and empty where it wasn't measured before."""
    new, old = now.figures[id_], before.figures.get(id_)
    if old is None:
        return ""
    ratio = new.median / old.median
    apart = new.low > old.high or new.high < old.low
    if not apart or abs(ratio - 1) <= NOISE:
        return "same"
    return "faster" if (ratio > 1) == new.more_is_better else "slower"


def table(now: Benchmark, before: Benchmark | None = None) -> str:
    """A line a figure; with an earlier benchmark how it changed, and what else is another one."""
    busy = f"; load {now.load:.1f} before" if now.load > BUSY else ""
    lines = [f"{now.device}, {plural(now.threads, 'thread')}, torch {now.versions['torch']}{busy}", ""]
    for id_, figure in now.figures.items():
        spread = f"{_short(figure.low)}–{_short(figure.high)}"
        line = f"{id_:<24}{_short(figure.median):>8}  {figure.unit:<18}{spread:>14}"
        if before is not None and (word := change(before, now, id_)):
            line += f"  {figure.median / before.figures[id_].median - 1:+.0%} {word}"
        lines.append(line)
    lines += ["", *(f"{name} failed: {why}" for name, why in now.failed.items())] if now.failed else []
    beside = [_beside(id_, now.figures[id_]) for id_ in ARTICLE if id_ in now.figures]
    lines += ["", "beside an RTX 4090 with real weights, by an article", *beside] if beside else []
    if before is not None:
        others = [f"{name} was {was}" for name, was in _differences(before, now)]
        lines += ["", f"compared with {time.strftime('%Y-%m-%d %H:%M', time.localtime(before.time))}", *others]
    return "\n".join(lines)


def _beside(id_: str, figure: Figure) -> str:
    there = ARTICLE[id_]
    times = figure.median / there if figure.more_is_better else there / figure.median
    return f"{id_:<24}{_short(there):>8}  {figure.unit:<18} here {times:.1f} times as fast"


def _differences(before: Benchmark, now: Benchmark) -> Iterator[tuple[str, Any]]:
    for name in ("host", "device", "threads"):
        if getattr(before, name) != getattr(now, name):
            yield name, getattr(before, name)
    if before.load > BUSY:
        yield "load", before.load
    yield from ((name, was) for name, was in before.versions.items() if was != now.versions.get(name))


def _figure(speed: "Speed") -> Figure:
    low, high = min(speed.values), max(speed.values)
    return Figure(speed.unit, speed.more_is_better, speed.median, low, high, len(speed.values))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _repeats(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 to 1000")
    return int(text)
