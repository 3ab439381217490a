"""Small videos made for tests, awkward in one way each, and something that finds what is in them."""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from finetune.video.tracks import Detection

SIZE = (96, 64)
SIDE = 16  # of the square that moves through most films
FRAMES, RATE = 250, 10  # of the long one, 25 s: three pieces
Image = NDArray[np.uint8]


def regular(count: int, rate: int = 10) -> list[Fraction]:
    return [Fraction(number, rate) for number in range(count)]


def place(number: int, width: int = SIZE[0]) -> int:
    """Where the square's left edge is in a frame: it goes right two pixels a frame, and begins again at the edge."""
    return 4 + 2 * number % (width - SIDE - 8)


def square(number: int, size: tuple[int, int] = SIZE) -> Image:
    """A red square on grey; even edges, so that no colour is halved."""
    image = np.full((size[1], size[0], 3), 120, np.uint8)
    left = place(number, size[0])
    image[20 : 20 + SIDE, left : left + SIDE] = (220, 30, 30)
    return image


def scenes(number: int) -> Image:
    """The same on backgrounds that change after 20 frames each."""
    image = square(number)
    grey = (image == 120).all(-1)
    image[grey] = ((120, 120, 120), (30, 60, 200), (60, 160, 60), (235, 235, 200))[number // 20 % 4]
    return image


def odd_scenes(number: int) -> Image:
    return scenes(number)[:-1, :-1]


def film(
    path: Path,
    times: Sequence[Fraction],
    *,
    unit: Fraction = Fraction(1, 1000),
    draw: Callable[[int], Image] = square,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    shape: Fraction | None = None,
    turned_deg: int = 0,
    sound: bool = False,
    container: dict[str, str] | None = None,
) -> Path:
    """A video with frame `draw(n)` at `times[n]` seconds. shape: of pixels. turned_deg: to the left, by a player."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream: Any = out.add_stream(codec, rate=10)
        first = draw(0)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt, stream.options = pix_fmt, {"crf": "12", "g": "10", **(options or {})}
        stream.codec_context.time_base = stream.time_base = unit
        if shape:
            stream.codec_context.sample_aspect_ratio = shape
        if turned_deg:
            stream.set_display_rotation(turned_deg)
        tone = out.add_stream("aac", rate=48000) if sound else None
        for number, seconds in enumerate(times):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = round(seconds / unit), unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if tone is not None:
            _beep(out, tone, float(times[-1]))
    return path


def _beep(out: Any, stream: Any, seconds: float) -> None:
    for number in range(int(seconds * 48000 / 1024)):
        wave = np.sin(np.arange(1024) / 20, dtype=np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, number * 1024, Fraction(1, 48000)
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


class SquareFinder:
    """Finds the red square by its colour: a detector whose every answer is known. `looked` counts frames."""

    def __init__(self) -> None:
        self.names = {0: "nothing", 1: "square"}
        self.looked = 0

    def reads(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def find(self, frames: Sequence[Image], width: int, height: int) -> list[list[Detection]]:
        self.looked += len(frames)
        return [self._found(frame) for frame in frames]

    def _found(self, frame: Image) -> list[Detection]:
        red = (frame[..., 0].astype(int) - frame[..., 1:].max(-1) > 90).nonzero()
        if not len(red[0]):
            return []
        box = (float(red[1].min()), float(red[0].min()), float(red[1].max() + 1), float(red[0].max() + 1))
        return [Detection("square", box, 0.9)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "annotations.jsonl").read_text().splitlines()]


def frames(path: Path) -> list[tuple[Fraction, Image]]:
    with av.open(str(path)) as container:
        return [
            (frame.pts * frame.time_base, frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
            if frame.pts is not None and frame.time_base is not None
        ]
