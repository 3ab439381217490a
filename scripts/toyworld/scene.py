"""What is in a picture, before anything is drawn: one or two things in a setting.

A scene is a small frozen value; everything the caption does not say (yaw, exact place, pose, light, scenery) follows
from its seed, so that one integer names one picture.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace

KINDS: tuple[str, ...] = (
    "robot",
    "cat",
    "house",
    "tree",
    "car",
    "rocket",
    "fish",
    "cup",
    "lamp",
    "bird",
    "boat",
    "mushroom",
    "flower",
    "snowman",
)

# sRGB, 0..255. Spread over hue AND lightness, so that the word can still be read off a shaded or hatched picture.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (217, 35, 38),
    "orange": (247, 127, 20),
    "yellow": (252, 214, 36),
    "green": (43, 158, 62),
    "blue": (36, 92, 214),
    "purple": (128, 54, 184),
    "pink": (252, 142, 190),
    "brown": (122, 70, 36),
    "white": (246, 246, 246),
    "black": (50, 50, 55),  # charcoal: parts and shading stay visible
}

SETTINGS: tuple[str, ...] = ("meadow", "beach", "city", "snow", "space", "kitchen")
SIZES: tuple[str, ...] = ("small", "big")
PLACES: tuple[str, ...] = ("left", "centre", "right")

TWO_THINGS_SHARE = 0.3
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Thing:
    """One object: its words are what a caption may say about it."""

    kind: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One or two things in a setting; `seed` decides all that the words leave open."""

    things: tuple[Thing, ...]
    setting: str
    seed: int


def sample_scene(seed: int, *, things: int | None = None) -> Scene:
    """The scene that `seed` names: uniform over all words, two things in about 30 % of the scenes.

    Two things always stand left and right of each other, are of different kinds, and are listed from left to right.
    `things` (1 or 2) fixes their number.
    """
    if things not in (None, 1, 2):
        raise ValueError(f"a scene holds 1 or 2 things, got things={things}")
    rng = random.Random(f"toyworld scene {seed}")  # seeding by text is stable across Python versions and platforms
    count = things or (2 if rng.random() < TWO_THINGS_SHARE else 1)
    kinds = rng.sample(KINDS, count)
    places = ["left", "right"] if count == 2 else [rng.choice(PLACES)]
    made = tuple(
        Thing(kind=kind, colour=rng.choice(list(COLOURS)), size=rng.choice(SIZES), place=place)
        for kind, place in zip(kinds, places, strict=True)
    )
    return Scene(things=made, setting=rng.choice(SETTINGS), seed=seed)


def mirrored(scene: Scene) -> Scene:
    """The scene whose words fit the mirror image of this one's picture."""
    opposite = {"left": "right", "right": "left"}
    things = (replace(thing, place=opposite.get(thing.place, thing.place)) for thing in reversed(scene.things))
    return replace(scene, things=tuple(things))


def held_out(scene: Scene) -> bool:
    """Whether any thing's (kind, colour, setting) belongs to the tenth of combinations that no training may see."""
    return any(_combination_held_out(thing.kind, thing.colour, scene.setting) for thing in scene.things)


def _combination_held_out(kind: str, colour: str, setting: str) -> bool:
    digest = hashlib.sha256(f"{kind}|{colour}|{setting}".encode()).digest()  # hash() differs from process to process
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0
