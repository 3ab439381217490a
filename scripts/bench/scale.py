"""What the size of a data set costs: the real commands on tiny bases, with so many small images or short conversations.

    python -m scripts.bench.scale --work outputs/scale --images 1000 10000 --rows 10000 100000

writes a line for each size to scale.jsonl: the preparation is killed half-way and goes on, then a few steps are
trained. Figures are per CPU second, because other programs may share the cores. `--page` measures nothing and writes
docs/scale.md.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from finetune.workstation.facts import processor
from tests.tiny_language_models import save_language
from tests.tiny_models import save_diffusion

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE_FILE = Path(__file__).with_name("scale.jsonl"), ROOT / "docs" / "scale.md"
SIDE, SPOTS = 64, 8  # pixels of an image, and of the noise that it is enlarged from
WORDS = ("red", "blue", "small", "old", "bright", "tall", "round", "quiet", "house", "boat", "tree", "cat", "hill")
WARM_UP, STEPS = 5, 105
POLL_S = 0.2
GIB_OF_RSS = 2**20  # Linux counts KiB
PAGE = """# Large data sets

What the size of a data set costs. The real commands run on tiny random bases, so that nearly all of the time is this
project's own: small JPEGs of {side} px that all differ, each with another caption, or conversations of some 120 tokens.

Seconds are CPU seconds of all cores, because other programs may run meanwhile; only the first are the clock's.

- *Prepared*: `finetune dataset`, killed with SIGKILL when half of the work was done, and typed again, with the start of
  both commands. *Per CPU s*: examples in a second of one core.
- *Kept*: share of the work that was not done again. Each encoded image and caption is stored at once; of rows it is
  noted every ten seconds how far they are.
- *Up to date*: the same command with nothing to do.
- *First step*: of `train`, until the end of it; it looks at captions and data set again.
- *Step*: the median of {steps} steps without the first {warm_up}.
- *GiB*: of the largest process.

| set | prepared, clock s | prepared, s | per CPU s | kept | GiB | up to date, s | first step, s | step, ms | GiB |
|---|---|---|---|---|---|---|---|---|---|
{rows}

What each further example costs, between the smallest and the largest of these sets:
{slopes}

Where and when:
{where}

The time of a step does not depend on the size of the set: it makes as many operations, and waits for the GPU as often,
in a large set as in a small one. A test counts them (`tests/unit/stages/test_counts.py`), and how often each image is
read, decoded and encoded: twice, twice and once, also over several epochs, runs and kills. Rows are read and tokenised
in constant memory; in training they are memory-mapped, and what was read counts as memory until the system takes it
back. Of each image, name, caption and hashes are in CPU memory; its pixels and latents are not.

Measured with `python -m scripts.bench.scale`. The lines are in `scripts/bench/scale.jsonl`.
"""


@dataclass(frozen=True)
class Ran:
    """A command that ended. gib: of its largest process. cpu_s: of all its processes."""

    code: int
    seconds: float
    cpu_s: float
    gib: float
    said: str


def main() -> None:
    given = arguments(sys.argv[1:])
    if given.page:
        PAGE_FILE.write_text(page([json.loads(line) for line in RESULTS.read_text().splitlines()]))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    for kind, counts in (("images", given.images), ("rows", given.rows)):
        for count in counts:
            line = measure(kind, count, given.work.resolve()) | where(given.note)
            with given.out.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="data, bases and runs")
    parser.add_argument("--images", type=int, nargs="*", default=[])
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    parser.add_argument("--note", default="", help="what else the machine does")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="only write docs/scale.md from scale.jsonl")
    given = parser.parse_args(words)
    if not given.page and not given.work:
        parser.error("--work is required")
    return given


def measure(kind: str, count: int, work: Path) -> dict[str, Any]:
    """Prepare a set, killed half-way once, and train a little; everything that its line holds."""
    base, data = base_of(kind, work), data_of(kind, count, work)
    folder = work / f"{kind}-{count}"
    shutil.rmtree(folder, ignore_errors=True)
    command = settings(kind, base, data, folder)
    killed = killed_half_way(["dataset", *command], folder / "cache", kind, count)
    prepared = ran(["-m", "finetune", "dataset", *command])
    require(prepared)
    kept = kept_share(kind, count, prepared.said, folder / "run")
    again = ran(["-m", "finetune", "dataset", *command])
    require(again)
    times = folder / "times.json"
    watched = ["-m", "scripts.bench.stopwatch", "--cpu", "--gib", "24", "--out", str(times), "-m", "finetune"]
    trained = ran([*watched, "train", *command])
    require(trained)
    noted = json.loads(times.read_text())
    shutil.rmtree(folder)
    cpu_s = killed.cpu_s + prepared.cpu_s
    return {
        "kind": kind,
        "count": count,
        "prepare_s": round(killed.seconds + prepared.seconds, 1),
        "prepare_cpu_s": round(cpu_s, 1),
        "per_cpu_s": round(count / cpu_s, 1),
        "kept_share": round(kept, 2),
        "prepare_gib": round(max(killed.gib, prepared.gib), 3),
        "up_to_date_s": round(again.cpu_s, 1),
        "first_step_s": round(noted["before_s"], 1),
        "step_s": round(statistics.median(noted["steps_s"][WARM_UP:]), 4),
        "train_gib": round(trained.gib, 3),
    }


def settings(kind: str, base: Path, data: Path, folder: Path) -> list[str]:
    """Of both commands."""
    plain = ["trainer.validate_every=0", "trainer.patience=0", "export.checkpoint=last", "export.formats=[peft]"]
    plain += ["sample.prompts=[]", "hardware.device=cpu", "trainer.precision=fp32", "lora.rank=4", "lora.dropout=0"]
    plain += [f"trainer.steps={STEPS}", f"trainer.save_every={STEPS}", "trainer.micro_batch=4", "trainer.accumulate=1"]
    folders = [f"run_dir={folder / 'run'}", f"data.cache={folder / 'cache'}", f"model.base={base}"]
    if kind == "rows":
        return ["conf=pirate_chat", f"data.file={data}", "data.length=256", *folders, *plain]
    small = ["model.resolution=32", "model.bucket_step=16", "lora.targets=attention", "caption.trigger=''"]
    return ["conf=pixar_style", f"data.folder={data}", *small, *folders, *plain]


def killed_half_way(words: Sequence[str], cache: Path, kind: str, count: int) -> Ran:
    """A command that is killed when half of the work is in the cache."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "finetune", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and stored(cache, kind) < count // 2:
        time.sleep(POLL_S)
    if process.returncode is not None:
        raise SystemExit("the command ended before it could be killed; see what it says, or take a larger set")
    workers = psutil.Process(process.pid).children(recursive=True)  # of which the system says nothing afterwards
    of_workers = sum(sum(worker.cpu_times()[:2]) for worker in workers)
    process.send_signal(signal.SIGKILL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = -signal.SIGKILL
    cpu_s, gib = used(usage)
    return Ran(process.returncode, time.monotonic() - began, cpu_s + of_workers, gib, said="")


def stored(cache: Path, kind: str) -> int:
    """Images, or rows, that are in the cache."""
    if kind == "images":  # a sixteenth of the folders of hashes; an image has an entry, and another of its caption
        return sum(len(list(cache.glob(f"{first:x}0/*.safetensors"))) for first in range(16)) * 8
    return sum(file.stat().st_size // 8 for file in cache.glob(".rows-*/lengths.bin"))


def kept_share(kind: str, count: int, said: str, run: Path) -> float:
    """How much of the work was not done again."""
    if kind == "rows":
        found = re.search(r"going on from conversation ([\d,]+)", said)
        return int(found[1].replace(",", "")) / count if found else 0.0
    figures = json.loads((run / "receipts" / "dataset.json").read_text())["figures"]
    return float(figures["cached"] / (figures["cached"] + figures["encoded"]))


def ran(words: Sequence[str]) -> Ran:
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr
    said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Ran(process.returncode, time.monotonic() - began, *used(usage), said)


def used(usage: resource.struct_rusage) -> tuple[float, float]:
    """CPU seconds and GiB."""
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / GIB_OF_RSS


def require(done: Ran) -> None:
    if done.code:
        raise SystemExit("\n".join(done.said.splitlines()[-6:]))


def base_of(kind: str, work: Path) -> Path:
    base = work / f"base-{kind}"
    if not base.exists():
        (save_diffusion if kind == "images" else save_language)(base)
    return base


def data_of(kind: str, count: int, work: Path) -> Path:
    """The set, made once."""
    data = work / f"{count}.jsonl" if kind == "rows" else work / f"images-of-{count}"
    if kind == "rows" and not data.exists():
        data.write_text("".join(conversations(count)))
    if kind == "images" and not (data / "metadata.jsonl").exists():
        data.mkdir(parents=True, exist_ok=True)
        paint(data, count)
    return data


def conversations(count: int) -> Iterator[str]:
    draw = random.Random(0)
    for number in range(count):
        asked, answered = (" ".join(draw.choices(WORDS, k=words)) for words in (8, 16))
        turns = [("user", f"{asked} {number}?"), ("assistant", f"{answered} {number}.")]
        yield json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n"


def paint(folder: Path, count: int) -> None:
    """Noise, enlarged: each image is another, and so is its caption."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(count):
        noise = Image.fromarray(draw.integers(0, 255, (SPOTS, SPOTS, 3), dtype=np.uint8))
        name = f"{number:06}.jpg"
        noise.resize((SIDE, SIDE)).save(folder / name, quality=80)
        words = " ".join(WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(5))
        rows.append(json.dumps({"file_name": name, "text": f"{words} {number}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


def where(note: str) -> dict[str, Any]:
    return {"hardware": f"{processor()}, {os.cpu_count()} cores", "note": note, "date": str(datetime.now(UTC).date())}


def page(lines: Iterable[dict[str, Any]]) -> str:
    """docs/scale.md: of each set the last line."""
    last = {(line["kind"], line["count"]): line for line in lines}
    found = [last[key] for key in sorted(last)]
    notes = sorted({f"{line['hardware']}, {line['date']}{', ' * bool(line['note'])}{line['note']}" for line in found})
    return PAGE.format(
        side=SIDE,
        steps=STEPS,
        warm_up=WARM_UP,
        rows="\n".join(map(cells, found)),
        slopes="\n".join(slope([line for line in found if line["kind"] == kind]) for kind in ("images", "rows")),
        where="\n".join(f"- {note}" for note in notes),
    )


def slope(lines: Sequence[dict[str, Any]]) -> str:
    """Of one kind, by size."""
    first, last = lines[0], lines[-1]

    def each(figure: str) -> float:
        return float((last[figure] - first[figure]) / (last["count"] - first["count"]))

    return (
        f"- {last['kind']}: {1e3 * each('prepare_cpu_s'):.1f} ms and {2**20 * each('prepare_gib'):.1f} KiB to prepare; "
        f"{1e6 * each('first_step_s'):.0f} µs and {2**20 * each('train_gib'):.1f} KiB of a training"
    )


def cells(line: dict[str, Any]) -> str:
    """One row of the table."""
    entries = [
        f"{line['count']:,} {line['kind']}",
        *(f"{line['prepare_s']:,.0f}", f"{line['prepare_cpu_s']:,.0f}", f"{line['per_cpu_s']:,.0f}"),
        *(f"{line['kept_share']:.0%}", f"{line['prepare_gib']:.2f}", f"{line['up_to_date_s']:.0f}"),
        *(f"{line['first_step_s']:.0f}", f"{1000 * line['step_s']:.0f}", f"{line['train_gib']:.2f}"),
    ]
    return f"| {' | '.join(entries)} |"


if __name__ == "__main__":
    main()
