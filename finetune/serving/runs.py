"""What the runs page shows: the run folders beside that of the recipe, by name, with what they hold.

Run folders may come from others. Nothing in one leads out of it: texts are sent as texts, images as thumbnails that
were drawn again, and training images of the recipe's own image folder alone.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from os.path import realpath
from pathlib import Path
from typing import Any

from finetune import kinds
from finetune.errors import ConfigError, RunError
from finetune.reporting import curves, thumbnails
from finetune.run import rundir, slow_steps
from finetune.run.hashing import Stamp, stamp_of
from finetune.run.receipts import load_record
from finetune.run.records import METRICS, Answers, CaptionSet, Run, Samples
from finetune.serving.requests import Refused

MOST_POINTS = 800  # of a curve; more can't be told apart on a screen
SIDE, SMALL_SIDE = 512, 160  # pixels of samples, and of what comes in numbers
MOST_SAMPLES, MOST_PREVIEWS = 60, 160
CAPTIONS_AT_ONCE = 24
REPORTED = (METRICS, rundir.CONFIG, "receipts/train.json")  # what a summary is made of
NO_FILE: Stamp = (0, 0, 0)
PREVIEW = "samples/"  # in front of the prompt, in TensorBoard's tags
TEXT_SUFFIX = "/text_summary"  # TensorBoard's, behind the tags of texts


class Runs:
    """The runs of one folder."""

    def __init__(self, folder: Path, own_images: str = "") -> None:
        """own_images: the only folder from which training images are shown, if any."""
        self.folder, self.own_images = folder, own_images

    def all(self) -> list[dict[str, Any]]:
        """A summary of each, the one that changed last first."""
        return sorted(map(_summed_up, self._runs()), key=lambda found: -found["changed"])

    def summary(self, name: str) -> dict[str, Any]:
        """What a run is and how far it came; of a damaged one, what is wrong with it."""
        return _summed_up(self._find(name))

    def curves(self, name: str) -> dict[str, curves.Points]:
        """Tag -> (step, value), thinned."""
        run = self._find(name)
        return {tag: _thinned(points) for tag, points in _curves(run, _stamp(run / METRICS)).items()}

    def samples(self, name: str) -> dict[str, Any]:
        """Base and tuned to each prompt and seed, as texts or as images."""
        run = self._find(name)
        with _refused():
            kind = kinds.named(_kind(rundir.written_config(run))).SAMPLES
            record: Samples | Answers | None = load_record(run, "sample", kind)
        if not isinstance(record, Samples):
            items = record.items[:MOST_SAMPLES] if record else ()
            return {"kind": "texts", "items": [asdict(item) for item in items]}
        folder, sides = Path(record.folder), {"base": "base_file", "tuned": "file"}
        return {
            "kind": "images",
            "items": [
                {"prompt": item.prompt, "seed": item.seed}
                | {side: _thumbnail(folder / getattr(item, file), run, SIDE) for side, file in sides.items()}
                for item in record.items[:MOST_SAMPLES]
            ],
        }

    def previews(self, name: str) -> list[dict[str, Any]]:
        """Samples over time, as they were made while the run trained."""
        run = self._find(name)
        files = tuple(sorted(file for file in (run / "tensorboard").rglob("events.*") if _is_inside(file, run)))
        return list(_previews(files, tuple(map(_stamp, files))))

    def captions(self, name: str, first: int) -> dict[str, Any]:
        """Some of the training images' captions, from the first on."""
        run = self._find(name)
        with _refused():
            record = load_record(run, "caption", CaptionSet)
        if record is None:
            return {"total": 0, "items": []}
        folder = Path(record.folder)
        shown = folder if self.own_images and realpath(folder) == realpath(self.own_images) else None
        items = [
            asdict(item) | {"image": _thumbnail(shown / item.file, shown, SMALL_SIDE) if shown else None}
            for item in record.items[first : first + CAPTIONS_AT_ONCE]
        ]
        return {"total": len(record.items), "items": items}

    def _runs(self) -> Iterator[Path]:
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if (path / rundir.CONFIG).is_file() and (path / "receipts").is_dir():
                yield path

    def _find(self, name: str) -> Path:
        for run in self._runs():
            if run.name == name:
                return run
        raise Refused(404, f"there is no run {name[:100]!r} here", code="run_not_found", param="name")


def _summed_up(run: Path) -> dict[str, Any]:
    stamps = tuple(_stamp(run / name) for name in REPORTED)
    changed = max(stamp[1] for stamp in stamps) / 1e9
    try:
        found = _summary(run, stamps)
    except RunError as error:
        found = {"state": "damaged", "problem": str(error)}
    if rundir.is_held(run):
        found = found | {"state": "running"}
    return {"name": run.name, "changed": changed} | found


def _stamp(file: Path) -> Stamp:
    try:
        return stamp_of(file)
    except OSError:  # not there yet, or moved away just now
        return NO_FILE


@lru_cache(maxsize=256)
def _summary(run: Path, stamps: tuple[Stamp, ...]) -> dict[str, Any]:
    """stamps: of `REPORTED`. Raises RunError for a damaged receipt or configuration."""
    settings = rundir.written_config(run)
    finished = load_record(run, "train", Run)
    found = _curves(run, stamps[0])
    losses = [value for _, value in found.get("loss/smoothed", [])]
    validation = [value for _, value in found.get("validation/mean", [])]
    return {
        "state": "finished" if finished else "stopped",
        "kind": _kind(settings),
        "base": str(settings.get("model", {}).get("base", "")),
        "rank": _whole(settings.get("lora", {}).get("rank")),
        "step": max((points[-1][0] for points in found.values()), default=0),
        "steps": _whole(trainer.get("steps")) if isinstance(trainer := settings.get("trainer"), dict) else None,
        "loss": losses[-1] if losses else None,
        "validation": min(validation, default=None),
        "slow": slow_steps.lines(found),
    }


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _kind(settings: dict[str, Any]) -> str:
    return str(settings.get("model", {}).get("kind"))


@lru_cache(maxsize=16)
def _curves(run: Path, stamp: Stamp) -> curves.Curves:
    """stamp: of the file; what hasn't changed is not read again."""
    return curves.read(run)


def _thinned(points: curves.Points) -> curves.Points:
    """Every so many, and the last."""
    every = -(-len(points) // MOST_POINTS)
    return points[:: every or 1] + (points[-1:] if every > 1 and (len(points) - 1) % every else [])


def _is_inside(file: Path, folder: Path) -> bool:
    return Path(realpath(file)).is_relative_to(realpath(folder))  # Path.resolve fails at a link to itself


def _thumbnail(file: Path, folder: Path, side: int) -> str | None:
    """A data URI; None for what can't be shown, or lies elsewhere."""
    return thumbnails.data_uri(file, side) if _is_inside(file, folder) else None


@lru_cache(maxsize=4)
def _previews(files: tuple[Path, ...], stamps: tuple[Stamp, ...]) -> tuple[dict[str, Any], ...]:
    """stamps: of the files, TensorBoard's. A resumed run made some of them twice; the later ones count."""
    found = {(tag, step): (file, value) for file in files for tag, step, value in _events(file)}
    last = sorted(found.items(), key=lambda entry: (entry[0][1], entry[0][0]))[-MOST_PREVIEWS:]
    return tuple(
        {
            "step": step,
            "prompt": tag.removeprefix(PREVIEW).partition(": ")[2].removesuffix(TEXT_SUFFIX),
            "text": None if isinstance(value, bytes) else value,
            "image": thumbnails.encoded(io.BytesIO(value), SMALL_SIDE) if isinstance(value, bytes) else None,
        }
        for (tag, step), (_, value) in last
    )


def _events(file: Path) -> Iterator[tuple[str, int, bytes | str]]:
    """Tag, step, and the image's file or the text, as far as the file can be read."""
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    try:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                content = list(value.tensor.string_val)
                if value.tag.startswith(PREVIEW) and content:  # an image's file stands behind its width and height
                    is_text = value.tag.endswith(TEXT_SUFFIX)
                    yield value.tag, event.step, content[0].decode(errors="replace") if is_text else content[-1]
    except (DecodeError, OSError):
        return


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except (RunError, ConfigError) as error:  # the latter of a kind of model that this version doesn't know
        raise Refused(409, str(error), code="run_damaged", param="name") from error
