"""One video annotated: the pass over it, and what is made of its lines: films, exports, contact sheet, report."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from finetune import hub
from finetune.config.schema import Precision
from finetune.errors import DataError, Interrupted, RunError
from finetune.memory.device import pick_device, pick_dtype
from finetune.reading import read_text
from finetune.run import rundir
from finetune.run.atomic import write_atomically
from finetune.run.hashing import hash_file, hash_of
from finetune.run.plain import UNREADABLE, from_plain
from finetune.run.progress import plural, progress, say
from finetune.run.signals import Stop, cause
from finetune.video import exports, page, pipeline, segments
from finetune.video.detector import Detector
from finetune.video.pipeline import NEVER, Finder
from finetune.video.records import Annotated
from finetune.video.settings import Annotate, as_plain
from finetune.video.source import opened

VERSION = 5  # of what a pass writes
RECORD, LINES, FILM, SHEET, REPORT = "annotation.json", "annotations.jsonl", "labelled.mp4", "sheet.jpg", "report.html"
PIECES, IMAGES = "pieces", "images"
PRODUCTS = {
    FILM: "film", SHEET: "film", IMAGES: "images", "coco.json": "coco", "data.yaml": "yolo", "labels": "yolo",
    "cvat.xml": "cvat",
}  # fmt: skip
"""What is made only where it is asked for -> the export, or the setting, that asks for it."""
COUNTS_LITTLE = ("name", "run_dir", "video", "folder", "workers", "batch", "device")  # of settings, for what is found


@cache
def load_detector(settings: Annotate) -> Detector:
    """The detector on its device, loaded once for all videos of a command; in 16 bit on a GPU."""
    device = pick_device(settings.device)
    dtype = pick_dtype(Precision.auto, device)
    return Detector(settings.detector, device, dtype, threshold=settings.threshold, classes=settings.classes)


def annotate(
    video: Path, folder: Path, settings: Annotate, load: Callable[[], Finder], asked: Stop = NEVER
) -> tuple[Annotated, bool]:
    """Annotate a video into a folder, on from where a cut run stopped; and whether there was anything to do.

    load: the detector, asked for where there is. asked: to stop, with Interrupted, as soon as a look is done.
    Raises DataError for what is no video, RunError where the folder can't be written or is in use.
    """
    with opened(video) as source:  # before the folder is made
        if settings.rate > source.facts.rate:
            per_second = f"{float(source.facts.rate):g} frames a second"
            say(f"warning: rate={float(settings.rate):g} is more than {video.name}'s {per_second}: looks repeat frames")
    sha256 = hash_file(video)
    _require_own(folder, settings.video, sha256)
    with rundir.held(folder, as_plain(settings), owns_config=True, hint="type batch=1"):
        about = {key: value for key, value in as_plain(settings).items() if key not in COUNTS_LITTLE}
        input_hash = hash_of(sha256, about, hub.content_hash(settings.detector), VERSION)
        record = _known(folder)
        wanted = (LINES, REPORT, *products(settings))
        if record is not None and record.input_hash == input_hash and all((folder / name).exists() for name in wanted):
            return record, False
        if asked.number is not None:  # while another video was annotated
            line = f"stopped by {cause(asked.number)} before {video.name}; the same command goes on from there"
            raise Interrupted(line, asked.number)
        detector = load()  # before anything is made: it may not be there
        pieces = folder / PIECES
        if not segments.are_of(pieces, input_hash):
            shutil.rmtree(folder / IMAGES, ignore_errors=True)  # of other times
            segments.begin(pieces, input_hash)
        record = _pass(video, folder, settings, detector, sha256, input_hash, asked)
        for name in set(PRODUCTS) - set(products(settings)):  # of other settings
            unasked = folder / name
            shutil.rmtree(unasked) if unasked.is_dir() else unasked.unlink(missing_ok=True)
        shutil.rmtree(pieces)
    return record, True


def products(settings: Annotate) -> list[str]:
    """What these settings ask for, beside lines, record and report."""
    asked = {"film": settings.labelled, "images": settings.images, **dict.fromkeys(settings.exports, True)}
    return [file for file, of in PRODUCTS.items() if asked.get(of)]


def _require_own(folder: Path, video: str, sha256: str) -> None:
    """Raises RunError for the folder of another video."""
    before, record = str(rundir.written_config(folder).get("video", "")), _known(folder)
    is_same = Path(before).absolute() == Path(video).absolute() or (record is not None and record.sha256 == sha256)
    if before and not is_same:
        raise RunError(f"{folder} holds the annotation of {before}; name another folder: name=NAME or run_dir=PATH")


def _pass(
    video: Path, folder: Path, settings: Annotate, detector: Finder, sha256: str, input_hash: str, asked: Stop
) -> Annotated:
    pieces = folder / PIECES
    images = folder / IMAGES if settings.images else None
    if images is not None:
        images.mkdir(exist_ok=True)
    began = time.monotonic()
    with opened(video) as source:
        facts = source.facts
        common = {
            "source": video.name,
            "sha256": sha256,
            "width": facts.width,
            "height": facts.height,
            "model": settings.detector,
            "threshold": settings.threshold,
        }
        work = pipeline.Work(source, detector, pieces, settings.rate, settings.batch, settings.labelled, images, common)
        done = segments.finished(pieces, filmed=settings.labelled)
        before = sum(len(piece.pts) for piece in done)
        if before:
            say(f"annotate: {plural(before, 'frame')} of {video.name} are done already")
        total = max(before, ceil((facts.duration or 0) * facts.rate))
        with progress("annotate", total, unit="frames", done=before) as shown:
            done = pipeline.run(work, done, shown, asked)
    if not done:
        raise DataError(f"{video} is damaged (no frame in it can be decoded); get it again")
    passed = time.monotonic() - began
    times = [pts for piece in done for pts in piece.pts]
    step = max(1, round(1 / (facts.rate * facts.unit)))
    if settings.labelled:
        segments.join(pieces, done, video, facts.unit, times[-1] + step, folder / FILM)
    text = "".join(read_text(segments.lines_path(pieces, piece.number)) for piece in done)
    write_atomically(folder / LINES, text)
    rows = [json.loads(line) for line in text.splitlines()]
    per_second = {name: round(watch.per_second, 1) for name, watch in work.watches.items()}
    per_second["together"] = round((len(times) - before) / passed, 1)
    seconds = float((times[-1] + step - times[0]) * facts.unit)
    record = Annotated(
        video=str(video),
        sha256=sha256,
        input_hash=input_hash,
        width=facts.width,
        height=facts.height,
        seconds=round(seconds, 3),
        frames=len(times),
        looks=len(rows),
        objects=sum(len(row["objects"]) for row in rows),
        scenes=tuple(round(start, 3) for start in done[-1].state["scenes"]),
        model=settings.detector,
        threshold=settings.threshold,
        classes=tuple(detector.names.values()),
        counts=_counts(rows),
        per_second=per_second,
        damage=source.damage_said(seconds),
        files=(LINES, *products(settings)),
    )
    exports.write(folder, settings.exports, record, rows)
    sheet = page.sheet(sorted(pieces.glob("look-*.jpg")), folder / SHEET)
    write_atomically(folder / REPORT, page.report(record, rows, sheet))
    write_atomically(folder / RECORD, json.dumps(asdict(record), indent=1))
    return record


def _known(folder: Path) -> Annotated | None:
    try:
        return from_plain(Annotated, json.loads(read_text(folder / RECORD)))
    except UNREADABLE:
        return None


def _counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    tracks = {(one["class"], one["track"]) for row in rows for one in row["objects"]}
    found: dict[str, int] = {}
    for name, _ in sorted(tracks):
        found[name] = found.get(name, 0) + 1
    return found
