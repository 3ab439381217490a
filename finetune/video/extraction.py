"""Images for training out of a video: sharp frames that differ from one another, or crops of what is in them.

Two passes, so that memory stays constant: the first measures every frame small, the second writes what was chosen.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.data.images.metadata import METADATA, Row, line_of, read_rows
from finetune.data.images.split import COLUMN, VALIDATION
from finetune.errors import DataError
from finetune.run.atomic import replace_folder, write_atomically
from finetune.run.hashing import hash_file
from finetune.run.progress import progress, say
from finetune.video.cuts import CutFinder, thumbnail
from finetune.video.pipeline import Finder
from finetune.video.records import Extracted
from finetune.video.settings import Frames
from finetune.video.source import Facts, Rgb, Source, opened, rgb
from finetune.video.tracks import Box

MEASURED_WIDTH = 320  # pixels: sharpness is compared at one size
CELLS = 24  # a side, of what two frames are compared by
QUALITY = 95
MADE = ".finetune-frames"  # in a folder that this command filled, and may fill again


@dataclass(frozen=True)
class Candidate:
    """The sharpest frame of a stretch. cells: [CELLS, CELLS] brightness, 0 to 1, without its mean."""

    pts: int
    seconds: float
    scene: int
    sharpness: float
    cells: NDArray[np.float32]


def extract(video: Path, folder: Path, settings: Frames, load: Callable[[], Finder]) -> Extracted:
    """Write the images, and `metadata.jsonl` with the scene, the time and the side (training or validation) of each.

    load: the detector, asked for crops alone. Texts of the same images that stand in the folder are kept. Raises
    DataError for what is no video, a folder of something else, one whose texts would be lost, and a video in which
    nothing is found.
    """
    before = _known(folder)
    sha256 = hash_file(video)
    with opened(video) as source:
        finder = load() if settings.crops else None
        candidates, sharpness, scenes, seconds = _measured(source, settings)
        damage = source.damage_said(seconds)
    chosen = choose(candidates, sharpness, settings)
    with replace_folder(folder) as made:
        with opened(video) as source:
            rows = list(_written(source, made, chosen, settings, finder))
        if not rows:
            what, keys = (" or ".join(settings.crops), "threshold") if settings.crops else ("sharp frame", "sharpness")
            raise DataError(f"{video}: no {what} of {settings.least_px} px was found; try a lower {keys} or least_px")
        sides = split(rows, settings.validation_share)
        about = {"source": video.name, "sha256": sha256}
        rows = _with_texts([row | {COLUMN: sides[row["scene"]]} | about for row in rows], before, folder)
        write_atomically(made / METADATA, "".join(f"{line_of(row)}\n" for row in rows))
        (made / MADE).write_text(json.dumps(about))
    held_out = sum(row[COLUMN] == VALIDATION for row in rows)
    if damage:
        say(f"warning: {video.name} is damaged: {damage}")
    if settings.validation_share and not held_out:
        why = f"no scene is small enough for validation_share={settings.validation_share:g}; try a larger one"
        one_scene = len({row["scene"] for row in rows}) == 1
        say(f"warning: nothing is held out: {'all images are of one scene' if one_scene else why}")
    return Extracted(str(video), str(folder), scenes, len(candidates), len(chosen), len(rows), held_out)


def choose(candidates: Sequence[Candidate], usual_sharpness: float, settings: Frames) -> list[Candidate]:
    """Of the candidates those that are sharp and unlike every one before, in the order of their times.

    usual_sharpness: the median of all frames. Where there are too many, scenes take turns and give their sharpest.
    """
    kept: list[Candidate] = []
    cells = np.empty((len(candidates), CELLS, CELLS), np.float32)
    for candidate in candidates:
        if candidate.sharpness < settings.sharpness * usual_sharpness:
            continue
        apart = np.abs(cells[: len(kept)] - candidate.cells).mean((1, 2))
        if apart.min(initial=np.inf) < settings.difference:
            continue
        cells[len(kept)] = candidate.cells
        kept.append(candidate)
    by_scene: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in sorted(kept, key=lambda one: -one.sharpness):
        by_scene[candidate.scene].append(candidate)
    turns = (one for turn in zip_longest(*by_scene.values()) for one in turn if one is not None)
    return sorted(islice(turns, settings.most), key=lambda one: one.pts)


def split(rows: Sequence[dict[str, Any]], share: float) -> dict[int, str]:
    """Each scene on one side: in a shuffled order that is always the same they go to validation until it has its share.

    None goes that is half as large again as what is missing, and one scene at least stays for training."""
    counts = Counter(row["scene"] for row in rows)
    sides = dict.fromkeys(sorted(counts), "train")
    room = share * len(rows)
    for scene in sorted(counts, key=lambda scene: hashlib.sha256(f"scene/{scene}".encode()).digest()):
        left = sum(side == "train" for side in sides.values())
        if left > 1 and counts[scene] <= 1.5 * room:
            sides[scene], room = VALIDATION, room - counts[scene]
    return sides


def sharpness(grey: NDArray[np.uint8]) -> float:
    """How much fine detail there is: the variance of the Laplacian over that of the brightness.

    Contrast counts on both sides, so that a dark scene is not called blurred."""
    values = grey.astype(np.float32)
    middle = values[1:-1, 1:-1]
    around = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:]
    return float((4 * middle - around).var() / (middle.var() + 1.0))


def _measured(source: Source, settings: Frames) -> tuple[list[Candidate], float, int, float]:
    """The sharpest frame of every stretch of a scene, the median sharpness of all frames, the number of scenes, and how
    many seconds there are."""
    facts, cuts = source.facts, CutFinder()
    found: list[Candidate] = []
    every: list[float] = []
    stretch, seconds = None, 0.0
    total = ceil((facts.duration or 0) * facts.rate)
    with progress("measure", total, unit="frames") as shown:
        for frame in source.frames():
            scene = cuts.look(float(frame.seconds), thumbnail(frame.picture))
            high = max(2 * CELLS, round(MEASURED_WIDTH * frame.picture.height / frame.picture.width))
            grey = frame.picture.reformat(MEASURED_WIDTH, high, format="gray", interpolation="AREA").to_ndarray()
            every.append(sharpness(grey))
            here = (scene, int(frame.seconds * settings.rate))
            if here != stretch or every[-1] > found[-1].sharpness:
                new = Candidate(frame.pts, float(frame.seconds), scene, every[-1], _cells(grey))
                found[len(found) - (here == stretch) :] = [new]
            stretch, seconds = here, float(frame.seconds + 1 / facts.rate)
            shown.advance()
    return found, median(every) if every else 0.0, cuts.scene + 1, seconds


def _cells(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    small = np.asarray(Image.fromarray(grey).resize((CELLS, CELLS), Image.Resampling.BOX), dtype=np.float32) / 255
    cells: NDArray[np.float32] = small - small.mean()
    return cells


def _written(
    source: Source, folder: Path, chosen: Sequence[Candidate], settings: Frames, finder: Finder | None
) -> Iterator[dict[str, Any]]:
    """Write the images; a row of metadata for each."""
    facts, wanted = source.facts, {one.pts: one for one in chosen}
    pictures = source.frames() if wanted else iter(())
    waiting: list[tuple[Candidate, Rgb, Rgb]] = []
    with progress("frames", len(chosen), unit="images") as shown:
        for frame in pictures:
            one = wanted.pop(frame.pts, None)
            if one is None:
                continue
            whole = rgb(frame.picture, facts, facts.width, facts.height)
            if finder is None:
                if min(whole.shape[:2]) >= settings.least_px:
                    yield _save(folder, f"{_name(one)}.jpg", whole, one, {})
            else:
                waiting.append((one, whole, rgb(frame.picture, facts, *finder.reads(facts.width, facts.height))))
                if len(waiting) == settings.batch:
                    yield from _crops(folder, waiting, facts, settings, finder)
                    waiting = []
            shown.advance()
            if not wanted:
                break
        if finder is not None and waiting:
            yield from _crops(folder, waiting, facts, settings, finder)


def _crops(
    folder: Path, waiting: Sequence[tuple[Candidate, Rgb, Rgb]], facts: Facts, settings: Frames, finder: Finder
) -> Iterator[dict[str, Any]]:
    found = finder.find([small for _, _, small in waiting], facts.width, facts.height)
    for (one, whole, _), detections in zip(waiting, found, strict=True):
        for number, detection in enumerate(detections):
            left, top, right, bottom = around(detection.box, settings.margin, facts)
            if detection.name in settings.crops and min(right - left, bottom - top) >= settings.least_px:
                about = {
                    "class": detection.name,
                    "score": round(detection.score, 4),
                    "bbox": [left, top, right, bottom],
                }
                name = f"{_name(one)}_{number:02d}_{detection.name.replace('/', '-').replace(' ', '-')}.jpg"
                yield _save(folder, name, whole[top:bottom, left:right], one, about)


def around(box: Box, margin: float, facts: Facts) -> tuple[int, int, int, int]:
    """A box with a margin, inside the frame, in whole pixels."""
    more = margin * max(box[2] - box[0], box[3] - box[1])
    left, top = max(0, round(box[0] - more)), max(0, round(box[1] - more))
    return left, top, min(facts.width, round(box[2] + more)), min(facts.height, round(box[3] + more))


def _save(folder: Path, name: str, pixels: Rgb, one: Candidate, about: dict[str, Any]) -> dict[str, Any]:
    Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name, quality=QUALITY, subsampling=0)
    # An empty text is a caption still to be written.
    row = {"file_name": name, "text": "", "scene": one.scene, "time_sec": round(one.seconds, 3)}
    return row | {"sharpness": round(one.sharpness, 4)} | about


def _name(one: Candidate) -> str:
    return f"scene{one.scene:04d}_{round(one.seconds * 1000):09d}ms"


def _known(folder: Path) -> Mapping[str, Row]:
    """The rows of a folder that this command filled. Raises DataError for one with something else in it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {}
    rows: Mapping[str, Row] = {}
    foreign = "something else"
    if (folder / MADE).exists():
        rows = read_rows(folder / METADATA) if (folder / METADATA).exists() else {}
        foreign = next((path.name for path in folder.iterdir() if path.name not in {MADE, METADATA, *rows}), "")
    if foreign:
        raise DataError(f"{folder} is there and holds {foreign}; name a new folder: folder=DIR")
    return rows


def _with_texts(rows: Sequence[dict[str, Any]], before: Mapping[str, Row], folder: Path) -> list[dict[str, Any]]:
    """Rows with the texts that the same images had. Raises DataError where one that a person wrote would be lost."""
    texts = {name: row for name, row in before.items() if row.text}
    videos = {row["file_name"]: row["sha256"] for row in rows}
    lost = {name for name, row in texts.items() if videos.get(name) != row.values.get("sha256")}
    if own := [name for name in texts if name in lost and not texts[name].is_generated]:
        raise DataError(f"{folder} holds texts that would be lost, such as that of {own[0]}; name a new folder")
    kept = {name: {**row.values, "text": row.text} for name, row in texts.items() if name not in lost}
    return [{**kept.get(row["file_name"], {}), **row, "text": kept.get(row["file_name"], row)["text"]} for row in rows]
