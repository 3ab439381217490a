"""Which frames of a video become images: every one is measured small, and the sharp ones unlike the others are chosen.

What was measured is kept in pieces, so that a cut run goes on.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.errors import Interrupted
from finetune.run.plain import from_plain
from finetune.run.progress import progress
from finetune.run.signals import Stop, cause
from finetune.video.cuts import CutFinder, thumbnail
from finetune.video.segments import Log
from finetune.video.settings import Frames
from finetune.video.source import Source

MEASURED_WIDTH = 320  # pixels: sharpness is compared at one size
CELLS = 24  # a side, of what two frames are compared by


@dataclass(frozen=True)
class Candidate:
    """A frame. stretch: its number, 1 / `rate` seconds long. cells: CELLS×CELLS bytes of brightness, in hexadecimal,
    where no frame before it in its stretch of its scene is as sharp; otherwise empty."""

    pts: int
    seconds: float
    scene: int
    stretch: int
    sharpness: float
    cells: str


@dataclass
class Measured:
    """Every frame's sharpness, and the sharpest frame of each stretch of a scene. damage: of the video, in words."""

    sharpness: list[float]
    sharpest: dict[tuple[int, int], Candidate]
    scenes: int = 0
    damage: str = ""

    def take(self, one: Candidate) -> None:
        self.sharpness.append(one.sharpness)
        if one.cells:
            self.sharpest[one.scene, one.stretch] = one

    def is_sharpest(self, scene: int, stretch: int, sharpness: float) -> bool:
        before = self.sharpest.get((scene, stretch))
        return before is None or sharpness > before.sharpness


def measure(source: Source, folder: Path, settings: Frames, asked: Stop) -> Measured:
    """Look at every frame, on from where a cut run stopped. folder: of the pieces.

    Raises Interrupted where `asked` says so, once a piece holds what was measured until then.
    """
    log, found = Log(folder), Measured([], {})
    for row in log.rows():
        found.take(from_plain(Candidate, row))
    facts, state = source.facts, log.state
    cuts = CutFinder.from_state(state["cuts"]) if state else CutFinder()
    start, last = state.get("start"), state.get("last")
    source.damaged.update(state.get("damaged", ()))

    def reached() -> dict[str, Any]:
        return {"start": start, "last": last, "cuts": cuts.state(), "damaged": sorted(source.damaged), "said": None}

    total = max(log.frames, ceil((facts.duration or 0) * facts.rate))
    with progress("measure", total, unit="frames", done=log.frames) as shown:
        frames = source.frames(start=start, after=last) if state.get("said") is None else iter(())
        for frame in frames:
            scene, stretch = (
                cuts.look(float(frame.seconds), thumbnail(frame.picture)),
                int(frame.seconds * settings.rate),
            )
            high = max(2 * CELLS, round(MEASURED_WIDTH * frame.picture.height / frame.picture.width))
            grey = frame.picture.reformat(MEASURED_WIDTH, high, format="gray", interpolation="AREA").to_ndarray()
            sharp = sharpness(grey)
            cells = _cells(grey) if found.is_sharpest(scene, stretch, sharp) else ""
            one = Candidate(frame.pts, float(frame.seconds), scene, stretch, sharp, cells)
            found.take(one)
            start, last = frame.pts if start is None else start, frame.pts
            if log.add(one.seconds, one.pts, [asdict(one)]) or asked.number is not None:
                log.commit(reached())
            shown.advance()
            if asked.number is not None:
                line = f"stopped by {cause(asked.number)} after {one.seconds:.1f} s of {source.path.name} were measured"
                raise Interrupted(f"{line}; the same command goes on from there", asked.number)
    if state.get("said") is None:
        seconds = 0.0 if start is None or last is None else float((last - start) * facts.unit + 1 / facts.rate)
        log.commit(reached() | {"said": source.damage_said(seconds)})
    found.scenes, found.damage = cuts.scene + 1, log.state["said"]
    return found


def choose(measured: Measured, settings: Frames) -> list[Candidate]:
    """Of the sharpest frames those that are sharp and unlike every one before, in the order of their times.

    Where there are too many, scenes take turns and give their sharpest.
    """
    kept: list[Candidate] = []
    least = settings.sharpness * median(measured.sharpness) if measured.sharpness else 0.0
    taken = np.empty((len(measured.sharpest), CELLS * CELLS), np.float32)
    for candidate in measured.sharpest.values():
        if candidate.sharpness < least:
            continue
        cells = np.frombuffer(bytes.fromhex(candidate.cells), np.uint8).astype(np.float32) / 255
        cells -= cells.mean()
        if np.abs(taken[: len(kept)] - cells).mean(1).min(initial=np.inf) < settings.difference:
            continue
        taken[len(kept)] = cells
        kept.append(candidate)
    by_scene: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in sorted(kept, key=lambda one: -one.sharpness):
        by_scene[candidate.scene].append(candidate)
    turns = (one for turn in zip_longest(*by_scene.values()) for one in turn if one is not None)
    return sorted(islice(turns, settings.most), key=lambda one: one.pts)


def sharpness(grey: NDArray[np.uint8]) -> float:
    """How much fine detail there is: the variance of the Laplacian over that of the brightness.

    Contrast counts on both sides, so that a dark scene is not called blurred."""
    values = grey.astype(np.float32)
    middle = values[1:-1, 1:-1]
    around = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:]
    return float((4 * middle - around).var() / (middle.var() + 1.0))


def _cells(grey: NDArray[np.uint8]) -> str:
    small = Image.fromarray(grey).resize((CELLS, CELLS), Image.Resampling.BOX)
    return small.tobytes().hex()
