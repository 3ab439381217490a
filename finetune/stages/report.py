"""One self-contained page about a run: images inside, curves as SVG, no script, nothing fetched.

Everything comes from what lies in the run folder (and the images that it names); what is missing is left out.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.config.describe import as_dict
from finetune.config.schema import Config
from finetune.errors import RunError
from finetune.reading import read_text, require_file
from finetune.reporting import curves
from finetune.reporting.page import Found, page
from finetune.reporting.thumbnails import NOT_SHOWN
from finetune.run import rundir
from finetune.run.atomic import write_atomically
from finetune.run.hashing import hash_of
from finetune.run.plain import UNREADABLE, first_line, from_plain
from finetune.run.progress import say
from finetune.run.receipts import load_receipt, save_receipt
from finetune.run.records import Answer, Report, Sample

STAGE = "report"
PAGE = "report.html"
STAGES = ("caption", "dataset", "train", "export", "sample")


def report(config: Config) -> Report:
    """Write `report.html` into the run folder, atomically. Raises RunError for a damaged receipt or a full disk."""
    start = time.monotonic()
    run_dir = Path(config.run_dir)
    found = _gather(run_dir)
    # Prices are today's: a run that is over can be given others.
    found = replace(found, settings=found.settings | {"cost": as_dict(config.cost)})
    html = page(found).encode(errors="replace")  # half a surrogate of a damaged file
    write_atomically(run_dir / PAGE, html)
    record = Report(str(run_dir / PAGE))
    save_receipt(
        run_dir,
        STAGE,
        record,
        input_hash=hash_of({stage: receipt.input_hash for stage, receipt in found.receipts.items()}),
        seconds=time.monotonic() - start,
        figures={"bytes": len(html), "pairs": len(found.samples) + len(found.answers)},
    )
    say(f"{STAGE}: {record.file}")
    return record


def _gather(run_dir: Path) -> Found:
    receipts = {stage: receipt for stage in STAGES if (receipt := load_receipt(run_dir, stage))}
    settings, config = rundir.written_config(run_dir), run_dir / rundir.CONFIG
    text = read_text(config) if settings else ""
    drew = "sample" not in receipts or receipts["sample"].record.get("items")  # else what lies there is older
    lines = _samples(run_dir / "samples" / "samples.jsonl") if drew else []
    samples = [line for line, _ in lines if isinstance(line, Sample)]
    answers = [line for line, _ in lines if isinstance(line, Answer)]
    drawn = _png_texts(run_dir / "samples" / samples[0].file) if samples else lines[0][1] if lines else {}
    return Found(run_dir, settings, text, receipts, curves.read(run_dir), samples, answers, drawn)


def _samples(file: Path) -> list[tuple[Sample | Answer, dict[str, Any]]]:
    """Each line as a record, and with all its values. Raises RunError for a damaged file."""
    try:
        lines = [json.loads(line) for line in read_text(file).split("\n") if line]
        return [(from_plain(Sample, line) if "file" in line else from_plain(Answer, line), line) for line in lines]
    except FileNotFoundError:
        return []
    except UNREADABLE as error:
        raise RunError(f"{file} is damaged ({first_line(error)}); delete it and run `finetune sample` again") from error


def _png_texts(file: Path) -> dict[str, Any]:
    """The settings that an image was drawn with; none of one that is gone or damaged."""
    try:
        require_file(file)
        with Image.open(file) as image:
            return {str(name): text for name, text in image.info.items()}
    except NOT_SHOWN:
        return {}
