"""Scenes of up to four things anywhere on the ground, near and far, partly behind one another: frames of a film.

A scene of `scene.py` is what a caption can say; a crowd is what a video shows. The renderer takes both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from scripts.toyworld.kinds import Placed, Stance, size_of, stand
from scripts.toyworld.parts import Pose
from scripts.toyworld.scene import COLOURS, KINDS, SETTINGS

MOST_THINGS = 4
HEIGHTS = (0.5, 1.2)  # of a picture that is 2 high; below, coarse looks leave a few cells of a thing
WIDEST = 1.5
SMALLER = 0.84  # with each thing more, or the nearer ones would hide the others
EDGE = 0.9
NEAREST_Z, FARTHEST_Z = 0.5, -1.3


@dataclass(frozen=True)
class Standing:
    """One thing of a crowd."""

    kind: str
    colour: str
    stance: Stance

    @property
    def placed(self) -> Placed:
        return stand(self.kind, self.colour, self.stance)


@dataclass(frozen=True)
class Crowd:
    """Things in a setting; `seed` scatters the scenery and the light."""

    things: tuple[Standing, ...]
    setting: str
    seed: int


def sample_crowd(seed: int) -> Crowd:
    """The crowd that `seed` names: one to four things, their middles apart from one another."""
    rng = random.Random(f"toyworld crowd {seed}")
    count = rng.randint(1, MOST_THINGS)
    slots = rng.sample(range(MOST_THINGS), count)
    largest = SMALLER ** (count - 1)
    return Crowd(tuple(_standing(slot, largest, rng) for slot in slots), rng.choice(SETTINGS), seed)


def _standing(slot: int, largest: float, rng: random.Random) -> Standing:
    kind, colour = rng.choice(KINDS), rng.choice(list(COLOURS))
    pose = Pose(*(rng.uniform(-1, 1) for _ in range(4)))
    wide, tall = size_of(kind, pose)
    low, high = HEIGHTS
    scale = min(rng.uniform(low, high * largest) / tall, WIDEST * largest / wide)
    room = max(0.0, EDGE - wide * scale / 2)
    middle = (slot + 0.5) / MOST_THINGS * 2 - 1 + rng.uniform(-0.15, 0.15)
    stance = Stance(
        x=max(-room, min(room, middle)),
        z=rng.uniform(FARTHEST_Z, NEAREST_Z),
        scale=scale,
        yaw_deg=rng.uniform(-35, 35),
        mirrored=rng.random() < 0.5,
        pose=pose,
    )
    return Standing(kind, colour, stance)
