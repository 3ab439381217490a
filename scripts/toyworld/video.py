"""A film of the toy world: three shots in three looks, things that move, and where they truly are.

    python -m scripts.toyworld video datasets/toy_video

The renderer draws squares; the film shows a wide strip of them, from the ground to above the things' heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from scripts.toyworld.boxes import LEAST_SIDE, boxes
from scripts.toyworld.crowd import Crowd, Standing
from scripts.toyworld.kinds import Stance, size_of
from scripts.toyworld.looks import STYLES
from scripts.toyworld.parts import Pose
from scripts.toyworld.render import render

WIDTH, HEIGHT = 320, 180
TOP = 104  # row of the square where the strip begins
RATE = 15  # frames a second
LOOKS_RATE = 5  # of true boxes a second: as often as `finetune annotate` looks by itself
SEED = 70_000_000
ENCODER = {"crf": "24", "preset": "slow"}

Way = Callable[[float], tuple[float, float]]


@dataclass(frozen=True)
class Actor:
    """A thing and its way: x and y for every moment of its shot, 0 to 1."""

    kind: str
    colour: str
    height: float
    z: float
    way: Way
    yaw_deg: float = 0.0
    mirrored: bool = False
    lively: float = 1.0

    def at(self, moment: float, seconds: float) -> Standing:
        swing = self.lively * math.sin(2 * math.pi * seconds)
        pose = Pose(lift=swing, tilt=0.5 * swing, look=0.0, girth=0.0)
        x, y = self.way(moment)
        still = Pose(lift=0.0, tilt=0.0, look=0.0, girth=0.0)
        scale = self.height / size_of(self.kind, still)[1]
        yaw = self.yaw_deg + 6 * swing
        stance = Stance(x=x, z=self.z, scale=scale, yaw_deg=yaw, mirrored=self.mirrored, pose=pose, y=y)
        return Standing(self.kind, self.colour, stance)


def across(start: float, end: float, hop: float = 0.0, height: float = 0.0) -> Way:
    """From one x to another at an even pace, hopping or flying."""
    return lambda moment: (start + (end - start) * moment, height + hop * abs(math.sin(5 * math.pi * moment)))


@dataclass(frozen=True)
class Shot:
    """seconds long, in a look."""

    seconds: float
    look: str
    setting: str
    actors: tuple[Actor, ...]


SHOTS = (
    Shot(
        3.4,
        "cartoon",
        "city",
        (
            Actor("car", "red", 0.44, 0.2, across(-1.5, 1.4), yaw_deg=8),
            Actor("robot", "blue", 0.62, -0.5, across(0.55, 0.15), yaw_deg=-10),
            Actor("lamp", "yellow", 0.6, -0.7, across(-0.75, -0.75), lively=0.1),
        ),
    ),
    Shot(
        3.4,
        "plastic",
        "beach",
        (
            Actor("boat", "white", 0.6, -0.6, across(0.75, -0.25), yaw_deg=-15),
            Actor("cat", "orange", 0.55, 0.3, across(-0.8, 0.5, hop=0.12), yaw_deg=20),
            Actor("bird", "purple", 0.34, -0.2, across(0.85, -0.9, height=0.52), yaw_deg=-15),
        ),
    ),
    Shot(
        3.2,
        "pixar",
        "meadow",
        (
            Actor("house", "blue", 0.74, -0.8, across(-0.62, -0.62), yaw_deg=-20, lively=0.0),
            Actor("snowman", "white", 0.52, 0.1, across(-0.1, 0.15, hop=0.06)),
            Actor("rocket", "red", 0.6, -0.3, lambda moment: (0.62, 0.9 * moment**2), lively=0.2),
        ),
    ),
)


def frames() -> list[tuple[Crowd, str]]:
    """Every frame of the film: what is in it, and its look."""
    made = []
    for number, shot in enumerate(SHOTS):
        count = round(shot.seconds * RATE)
        for index in range(count):
            things = tuple(actor.at(index / max(1, count - 1), index / RATE) for actor in shot.actors)
            made.append((Crowd(things, shot.setting, SEED + number), shot.look))
    return made


def write_video(folder: Path, *, device: str = "cpu", supersample: float = 2) -> None:
    """`toy_video.mp4`, and `boxes.json` with what is truly at each look of five a second."""
    import av

    folder.mkdir(parents=True, exist_ok=True)
    container = av.open(str(folder / "toy_video.mp4"), "w", format="mp4", options={"movflags": "+faststart"})
    stream: Any = container.add_stream("libx264", rate=RATE)
    stream.width, stream.height, stream.pix_fmt, stream.options = WIDTH, HEIGHT, "yuv420p", ENCODER
    truths = []
    for number, (crowd, look) in enumerate(frames()):
        square = render([crowd], look, WIDTH, device=device, supersample=supersample)[0].cpu()
        strip = square[:, TOP : TOP + HEIGHT].permute(1, 2, 0).contiguous().numpy()
        frame = av.VideoFrame.from_ndarray(strip, format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, RATE)
        container.mux(stream.encode(frame))
        if number % (RATE // LOOKS_RATE) == 0:
            found = [(box.kind, strip_box(box.edges)) for box in boxes([crowd], [STYLES[look]], WIDTH, device)[0]]
            truths.append([{"class": kind, "bbox": box} for kind, box in found if box])
    container.mux(stream.encode(None))
    container.close()
    (folder / "boxes.json").write_text(json.dumps(truths) + "\n", encoding="utf-8")


def strip_box(edges: tuple[float, float, float, float]) -> list[int] | None:
    """A box of the square in pixels of the strip; None where too little of it shows."""
    left, top, right, bottom = (round(WIDTH * edge) for edge in edges)
    box = [max(0, left), max(0, top - TOP), min(WIDTH, right), min(HEIGHT, bottom - TOP)]
    shows = min(box[2] - box[0], box[3] - box[1]) >= LEAST_SIDE * WIDTH
    return box if shows else None
