"""How fast training is beside what people use today: ours and the peer's, one after the other, on one capped GPU.

    python -m scripts.bench.speed --rows sd15-4,sdxl --peers FOLDER --work WORK --out speed.jsonl

FOLDER holds the LoRA examples of diffusers (`train_text_to_image_lora.py`, `train_text_to_image_lora_sdxl.py`), which
are not ours to ship; for language rows TRL has to be installed. Both sides train the same random weights of full size,
on the same data, rank, precision and layers, and both are timed by the same stopwatch, from optimiser step to optimiser
step. A line a row; a side that failed leaves null.

    python -m scripts.bench.speed --page speed.jsonl

needs no GPU: it adds the share of the arithmetic limit and writes docs/speed.md.
"""

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from finetune.reporting import curves
from scripts.bench import memory
from scripts.bench.speed_rows import GIB, ROWS, Row

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 8  # steps in which kernels are chosen and graphs captured
SECONDS = 150.0  # at most, for one side
MATRIX = 8192
COUNT = "count.txt"  # in a peer's output: what a step counted, where that differs from step to step

PAGE = """# Speed beside other trainers

Each row is the real `train` command beside the program that people use today for the same work, one after the other on
the same {hardware}, both capped at {gib:.0f} GiB: the same random weights of full size, data, rank 16, layers and bf16.
A stopwatch around both notes when the optimiser takes its steps; the figures are medians after {warm_up} steps.

The peers of Stable Diffusion are diffusers' example scripts for LoRA, as they are but for the batch of the row. That of
FLUX.1 is a loop on diffusers' classes in the settings of its example for NF4 (`scripts/bench/flux_lora.py`). That of
language models is TRL's `SFTTrainer` with PEFT, NF4, packing and activation checkpointing, with Liger kernels in the
row of eight, and with its defaults (no packing) in that of short rows. That of captions is transformers' own loop, an
image at a time. Padding does not count as tokens. Text encoders were shortened to a few layers; the peers of Stable
Diffusion run them, and the autoencoder, in every step. A dash was not measured yet.

| row | unit | ours per second | GiB | first step, s | peer | GiB | first step, s | ratio | share of the limit | date |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}

*First step*: seconds from the command to the end of it, with imports, loading, encoding, plan, dry run, validation and
a preview of ours. *Limit*: the step's products alone, at the {tflops:.0f} TFLOP/s that a large bf16 product reached on
the same GPU. Measured with `python -m scripts.bench.speed`, one run each, torch {torch}. The lines, with every
step's time, are in `scripts/bench/speed.jsonl`.

## What bounds them now
{bounds}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="names, separated by commas; all unless given")
    parser.add_argument("--peers", type=Path, help="folder of the peers' scripts")
    parser.add_argument("--work", type=Path, help="bases and run folders")
    parser.add_argument("--out", type=Path, help="JSON lines, appended to")
    parser.add_argument("--tiny", action="store_true", help="tiny bases on a CPU: do all commands work?")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of these lines")
    given = parser.parse_args()
    if given.page:
        add_limits(given.page, ROOT / "docs" / "speed.md")
        return
    if not (given.work and given.out and given.peers):
        parser.error("--peers, --work and --out are needed to measure")
    for name in given.rows.split(","):
        if name not in ROWS:
            parser.error(f"no row {name}; there are: {', '.join(ROWS)}")
        line = measure(name, given.peers, given.work, tiny=given.tiny)
        with given.out.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        shown = {key: value for key, value in line.items() if not key.endswith("steps_s")}
        print(json.dumps(shown), flush=True)


def measure(name: str, peers: Path, work: Path, *, tiny: bool = False) -> dict[str, Any]:
    """Train a row on both sides; everything that its line holds."""
    from scripts.bench import tiny_rows
    from scripts.bench.bases import build

    row, base = ROWS[name], work / "bases" / ROWS[name].preset
    if tiny:
        row = tiny_rows.reduced(row, base)
    elif not base.exists():
        build(row.preset, base, torch.device("cuda"))
    run, data = work / "runs" / name, data_of(row, work)
    shutil.rmtree(run, ignore_errors=True)
    words = ["-m", "finetune", *row.command(name, base, run, data)]
    filled = {"BASE": base, "DATA": data, "OUT": work / "peer", "STEPS": row.steps}
    script, *arguments = row.peer
    for key, value in filled.items():
        arguments = [argument.replace(key, str(value)) for argument in arguments]
    ours, theirs = timed(words, work, row.stage), timed([str(peers / script), *arguments], work, row.stage)
    padding = [share for _, share in curves.read(run).get("train/padding", [])]
    count = row.count * (1 - statistics.fmean(padding)) if padding else row.count
    rates = [rate(side, of_step) for side, of_step in ((ours, count), (theirs, theirs.pop("count", row.peer_count)))]
    return {
        "row": name,
        "ours": rates[0],
        "peer": rates[1],
        "ratio": rates[0] / rates[1] if all(rates) else None,
        **{f"ours_{key}": value for key, value in ours.items()},
        **{f"peer_{key}": value for key, value in theirs.items()},
        "matmul_tflops": matmul_tflops(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def data_of(row: Row, work: Path) -> Path:
    """What both sides of a row work on."""
    from scripts.bench import speed_data

    if row.data == "photos":
        return speed_data.photos(work / "photos", row.count * row.steps)
    if row.data == "short":
        return speed_data.short_conversations(work / "short.jsonl")
    return work / "images" if row.unit == "images" else memory.CONVERSATIONS


def timed(words: list[str], work: Path, stage: str, seconds: float = SECONDS) -> dict[str, Any]:
    """What the stopwatch noted of a program; what it said last if it failed. seconds: at most."""
    times = work / "times.json"
    times.unlink(missing_ok=True)
    shutil.rmtree(work / "peer", ignore_errors=True)
    options = ["--gib", str(GIB), "--out", str(times), "--seconds", str(seconds)]
    options += ["--captions"] if stage == "caption" else []
    command = [sys.executable, "-m", "scripts.bench.stopwatch", *options, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = (done.stderr + done.stdout).strip().splitlines()[-6:]
    noted: dict[str, Any] = json.loads(times.read_text()) if times.exists() else {"steps_s": []}
    counted = work / "peer" / COUNT
    noted |= {"count": float(counted.read_text())} if counted.exists() else {}
    return noted | ({"said": said} if done.returncode else {})


def rate(noted: dict[str, Any], count: int) -> float | None:
    """Images or tokens per second, of the median step."""
    steps = noted["steps_s"][WARM_UP:]
    return count / statistics.median(steps) if steps else None


def matmul_tflops() -> float | None:
    """Of one large bf16 product on this GPU."""
    if not torch.cuda.is_available():
        return None
    matrix = torch.ones(MATRIX, MATRIX, dtype=torch.bfloat16, device="cuda")
    seconds = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # type: ignore[no-untyped-call]
        _ = matrix @ matrix
        end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)  # type: ignore[no-untyped-call]
    return 2 * MATRIX**3 / statistics.median(seconds) / 1e12


def add_limits(results: Path, page: Path) -> None:
    """Put the arithmetic of a step into each line that has none yet, and write the page."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for line in lines:
        row = ROWS[line["row"]]
        if "share_of_limit" in line or row.stage != "train":
            continue
        candidates, (micro_batch, *_) = memory.candidates_for(row.case(line["row"]))
        count = row.count * micro_batch / candidates.effective
        limit = count / (candidates.step(micro_batch, 0).flops / (1e12 * line["matmul_tflops"]))
        line["share_of_limit"] = line["ours"] / limit if line["ours"] else None
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.write_text(table(lines))


def table(lines: list[dict[str, Any]]) -> str:
    """docs/speed.md: of each row the last line."""
    last = {line["row"]: line for line in lines}
    return PAGE.format(
        hardware=lines[0]["hardware"],
        gib=GIB,
        warm_up=WARM_UP,
        rows="\n".join(cells(name, last.get(name, {})) for name in ROWS),
        tflops=statistics.median(line["matmul_tflops"] for line in last.values()),
        torch=lines[0]["torch"],
        bounds="\n".join(bounds()),
    )


def bounds() -> list[str]:
    """What bounds the rows, those of one bound together."""
    found: dict[str, list[str]] = {}
    for name, row in ROWS.items():
        found.setdefault(row.bound, []).append(f"`{name}`")
    return [f"- {bound[0].upper()}{bound[1:]}: {', '.join(names)}." for bound, names in found.items()]


def cells(name: str, line: dict[str, Any]) -> str:
    """One row of the table; a dash for what was not measured."""

    def shown(key: str, form: str) -> str:
        return "–" if line.get(key) is None else f"{line[key]:{form}}"

    unit = ROWS[name].unit
    form = ",.1f" if unit == "images" else ",.0f"
    sides = [
        shown(key, of_key)
        for side in ("ours", "peer")
        for key, of_key in ((side, form), (f"{side}_gib", ".1f"), (f"{side}_before_s", ".0f"))
    ]
    entries = [f"`{name}`", unit, *sides, shown("ratio", ".2f"), shown("share_of_limit", ".0%"), shown("date", "")]
    return f"| {' | '.join(entries)} |"


if __name__ == "__main__":
    main()
