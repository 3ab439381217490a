"""Images for training out of a video: sharp frames that differ from one another, or crops of what is in them.

Two passes, so that memory stays constant: the first measures every frame small, the second writes what was chosen. What
they have done is kept beside the folder, in pieces, until all is done.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune import hub
from finetune.data.images.metadata import METADATA, Row, line_of, read_rows
from finetune.data.images.split import COLUMN, VALIDATION
from finetune.errors import DataError, Interrupted, RunError
from finetune.run.atomic import remove_leftovers, replace_folder, write_atomically
from finetune.run.hashing import hash_file, hash_of
from finetune.run.progress import plural, progress, say
from finetune.run.signals import Stop, cause
from finetune.video import segments
from finetune.video.measuring import Candidate, choose, measure
from finetune.video.pipeline import NEVER, Finder
from finetune.video.records import Extracted
from finetune.video.segments import Log
from finetune.video.settings import Frames, as_plain
from finetune.video.source import Facts, Rgb, Source, opened, rgb
from finetune.video.tracks import Box

VERSION = 1  # of what is kept in pieces
IMAGES = "images"
COUNTS_LITTLE = ("video", "folder", "batch", "device")  # of settings, for which images there are
QUALITY = 95
MADE = ".finetune-frames"  # in a folder that this command filled, and may fill again
Taken = tuple[Candidate, Any]
"""A chosen frame and its picture."""


def extract(video: Path, folder: Path, settings: Frames, load: Callable[[], Finder], asked: Stop = NEVER) -> Extracted:
    """Write the images, and `metadata.jsonl` with the scene, the time and the side (training or validation) of each.

    On from where a cut run stopped: what is done lies beside the folder until all is. load: the detector, asked for
    crops alone. asked: to stop, with Interrupted. Texts of the same images that stand in the folder are kept. Raises
    DataError for what is no video, a folder of something else, one whose texts would be lost, and a video in which
    nothing is found; RunError where the folder can't be written or is being filled.
    """
    _known(folder)  # refused before anything is made
    with opened(video):
        finder = load() if settings.crops else None
    sha256 = hash_file(video)
    about = {"source": video.name, "sha256": sha256}
    beside = folder.with_name(f".{folder.name}.frames")
    with _held(beside, folder):
        remove_leftovers(folder.parent, {"": re.escape(folder.name)})  # a kill may have left it aside, with its texts
        before = _known(folder)
        pieces, input_hash = beside / "pieces", _input_hash(sha256, settings)
        if not segments.are_of(pieces, input_hash):
            segments.begin(pieces, input_hash)
        with opened(video) as source:
            measured = measure(source, pieces / "measured", settings, asked)
        chosen = choose(measured, settings)
        try:
            with opened(video) as source:
                rows = _written(source, pieces, chosen, settings, finder, asked)
            sides = split(rows, settings.validation_share)
            rows = _with_texts([row | {COLUMN: sides[row["scene"]]} | about for row in rows], before, folder)
        except DataError:  # the same command would end so again
            shutil.rmtree(beside)
            raise
        _fill(folder, pieces / IMAGES, rows, about)
        shutil.rmtree(beside)
    held_out = sum(row[COLUMN] == VALIDATION for row in rows)
    if measured.damage:
        say(f"warning: {video.name} is damaged: {measured.damage}")
    if settings.validation_share and not held_out:
        why = f"no scene is small enough for validation_share={settings.validation_share:g}; try a larger one"
        one_scene = len({row["scene"] for row in rows}) == 1
        say(f"warning: nothing is held out: {'all images are of one scene' if one_scene else why}")
    counts = measured.scenes, len(measured.sharpest), len(chosen), len(rows), held_out
    return Extracted(str(video), str(folder), *counts)


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


@contextmanager
def _held(beside: Path, folder: Path) -> Iterator[None]:
    """Only one command at a time works beside a folder."""
    from filelock import FileLock, Timeout

    try:
        beside.mkdir(parents=True, exist_ok=True)
        with FileLock(beside / ".lock", timeout=0):
            yield
    except Timeout as error:
        line = f"{folder} is being filled by another command; wait for it, or name another folder: folder=DIR"
        raise RunError(line) from error
    except OSError as error:
        raise RunError(
            f"cannot write {beside} ({error.strerror}); free the disk or choose a folder you may write"
        ) from error


def _input_hash(sha256: str, settings: Frames) -> str:
    """Of what decides which images there are, and what is in them."""
    about = {key: value for key, value in as_plain(settings).items() if key not in COUNTS_LITTLE}
    return hash_of(sha256, about, hub.content_hash(settings.detector) if settings.crops else "", VERSION)


def _written(
    source: Source, pieces: Path, chosen: Sequence[Candidate], settings: Frames, finder: Finder | None, asked: Stop
) -> list[dict[str, Any]]:
    """Write the images that are not there yet; a row of metadata for each.

    Raises Interrupted where `asked` says so, once a piece holds what was written until then.
    """
    images, log = pieces / IMAGES, Log(pieces / "written")
    images.mkdir(exist_ok=True)
    rows = list(log.rows())
    if not all((images / row["file_name"]).exists() for row in rows):  # killed while the folder took its place
        shutil.rmtree(log.folder)
        rows, log = [], Log(log.folder)
    done, name = log.frames, source.path.name
    if done:
        say(f"frames: {done} of {plural(len(chosen), 'frame')} of {name} are done already")
    with progress("frames", len(chosen), unit="frames", done=done) as shown:
        for batch in _batches(source, chosen, done, settings.batch if finder else 1, asked):
            where = images, batch, source.facts, settings
            of_each = _crops(*where, finder) if finder else _wholes(*where)
            over = False
            for (one, _), found in zip(batch, of_each, strict=True):
                rows += found
                over = log.add(one.seconds, one.pts, found) or over
                shown.advance()
            if over:
                log.commit({})
    if log.times:
        log.commit({})
    if asked.number is not None and log.frames < len(chosen):
        line = f"stopped by {cause(asked.number)} after {log.frames} of {len(chosen)} chosen frames of {name}"
        raise Interrupted(f"{line}; the same command goes on from there", asked.number)
    if not rows:
        what, keys = (" or ".join(settings.crops), "threshold") if settings.crops else ("sharp frame", "sharpness")
        raise DataError(f"{source.path}: no {what} of {settings.least_px} px was found; try a lower {keys} or least_px")
    return rows


def _batches(source: Source, chosen: Sequence[Candidate], done: int, size: int, asked: Stop) -> Iterator[list[Taken]]:
    """The chosen frames behind those that are done, so many together. A batch that a signal cuts is left out: the
    detector gives the very same boxes only for the same frames together."""
    wanted, batch = {one.pts: one for one in chosen[done:]}, list[Taken]()
    frames = source.frames(after=chosen[done - 1].pts if done else None) if wanted else iter(())
    for frame in frames:
        if asked.number is not None:
            return
        one = wanted.pop(frame.pts, None)
        if one is None:
            continue
        batch.append((one, frame.picture))
        if len(batch) == size or not wanted:
            yield batch
            batch = []
        if not wanted:
            return
    if batch:  # a damaged video, in which not every frame is found again
        yield batch


def _wholes(folder: Path, batch: Sequence[Taken], facts: Facts, settings: Frames) -> Iterator[list[dict[str, Any]]]:
    for one, picture in batch:
        whole = rgb(picture, facts, facts.width, facts.height)
        is_large = min(whole.shape[:2]) >= settings.least_px
        yield [_save(folder, f"{_name(one)}.jpg", whole, one, {})] if is_large else []


def _crops(
    folder: Path, batch: Sequence[Taken], facts: Facts, settings: Frames, finder: Finder
) -> Iterator[list[dict[str, Any]]]:
    size = finder.reads(facts.width, facts.height)
    found = finder.find([rgb(picture, facts, *size) for _, picture in batch], facts.width, facts.height)
    for (one, picture), detections in zip(batch, found, strict=True):
        whole, rows = rgb(picture, facts, facts.width, facts.height), []
        for number, detection in enumerate(detections):
            left, top, right, bottom = around(detection.box, settings.margin, facts)
            if detection.name in settings.crops and min(right - left, bottom - top) >= settings.least_px:
                about = {
                    "class": detection.name,
                    "score": round(detection.score, 4),
                    "bbox": [left, top, right, bottom],
                }
                name = f"{_name(one)}_{number:02d}_{detection.name.replace('/', '-').replace(' ', '-')}.jpg"
                rows.append(_save(folder, name, whole[top:bottom, left:right], one, about))
        yield rows


def around(box: Box, margin: float, facts: Facts) -> tuple[int, int, int, int]:
    """A box with a margin, inside the frame, in whole pixels."""
    more = margin * max(box[2] - box[0], box[3] - box[1])
    left, top = max(0, round(box[0] - more)), max(0, round(box[1] - more))
    return left, top, min(facts.width, round(box[2] + more)), min(facts.height, round(box[3] + more))


def _fill(folder: Path, images: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Let the images take the folder's place, with their metadata."""
    names = {row["file_name"] for row in rows}
    for path in images.iterdir():
        if path.name not in names:  # of a batch that was cut
            path.unlink()
    write_atomically(images / METADATA, "".join(f"{line_of(row)}\n" for row in rows))
    (images / MADE).write_text(json.dumps(about))
    with replace_folder(folder) as made:
        images.replace(made)


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
