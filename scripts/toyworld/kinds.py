"""From a thing's words to placed parts: the registry of kinds, and where and how each thing of a scene stands.

World units: half a picture is 1, x right, y up from the ground, z towards the camera; things stand near z = 0.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scripts.toyworld import beings, objects
from scripts.toyworld.parts import PALE, Material, Part, Pose, Shape
from scripts.toyworld.scene import COLOURS, Scene, Thing

BUILDERS: dict[str, Callable[[Pose], list[Part]]] = {
    "robot": beings.robot,
    "cat": beings.cat,
    "house": objects.house,
    "tree": objects.tree,
    "car": objects.car,
    "rocket": objects.rocket,
    "fish": beings.fish,
    "cup": objects.cup,
    "lamp": objects.lamp,
    "bird": beings.bird,
    "boat": objects.boat,
    "mushroom": beings.mushroom,
    "flower": beings.flower,
    "snowman": beings.snowman,
}

# Seen from the side, so turned a little towards the camera where there is perspective; the house shows its flank.
_TURNED_DEG = {"car": -26.0, "fish": -16.0, "boat": -20.0, "house": -20.0}
_SIDEWAYS = frozenset(("car", "fish", "boat"))

_HEIGHT = {"big": 1.22, "small": 0.78}  # of a picture that is 2 high
_TWO_THINGS_SCALE = 0.84
_CENTRE_X = {"left": -0.40, "centre": 0.0, "right": 0.40}
_CENTRE_X_OF_TWO = {"left": -0.49, "right": 0.49}
_WIDTH_LIMIT, _WIDTH_LIMIT_ASIDE, _WIDTH_LIMIT_OF_TWO = 1.55, 1.14, 0.9
_EDGE = 0.94  # nothing reaches nearer than this to the picture's border at 1
_PALE_ON_WHITE = (178, 186, 198)  # white trim would vanish on a white thing


@dataclass(frozen=True)
class Placed:
    """A thing's parts, dyed, with its place in the world: world = at + scale * turn(yaw) @ mirror @ local."""

    parts: list[Part]
    rgb: list[tuple[float, float, float]]
    """One sRGB colour in 0..1 per part."""
    at: tuple[float, float, float]
    scale: float
    yaw_deg: float
    mirrored: bool
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    """Bounding box in the thing's own coordinates."""


@dataclass(frozen=True)
class Stance:
    """Where and how one thing stands: its middle's place in the world, its scale, its turn before it is mirrored."""

    x: float
    z: float
    scale: float
    yaw_deg: float
    mirrored: bool
    pose: Pose
    y: float = 0.0


def place_things(scene: Scene, *, frontal: bool) -> list[Placed]:
    """The scene's things, ready to be traced; `frontal` turns each one's face to the picture plane."""
    rng = random.Random(f"toyworld stance {scene.seed}")
    return [_place(thing, len(scene.things), rng, frontal=frontal) for thing in scene.things]


def _place(thing: Thing, count: int, rng: random.Random, *, frontal: bool) -> Placed:
    # Drawn in a fixed order, whatever the style, so that all styles show the same scene.
    lift, tilt, look, girth, turn, aside, deep, grow = (rng.uniform(-1, 1) for _ in range(8))
    mirrored = rng.random() < 0.5
    pose = Pose(lift=lift, tilt=tilt, look=look, girth=girth)
    wide, tall = size_of(thing.kind, pose)
    height = _HEIGHT[thing.size] * (1 + 0.035 * grow)
    if count == 2:
        x, limit = _CENTRE_X_OF_TWO[thing.place], _WIDTH_LIMIT_OF_TWO
        height *= _TWO_THINGS_SCALE
    else:
        x = _CENTRE_X[thing.place] + 0.05 * aside
        limit = _WIDTH_LIMIT if thing.place == "centre" else _WIDTH_LIMIT_ASIDE
    if thing.size == "small":
        limit *= _HEIGHT["small"] / _HEIGHT["big"]
    scale = min(height / tall, limit / wide)
    room = max(0.0, _EDGE - wide * scale / 2)
    x = max(-room, min(room, x))
    sideways = thing.kind in _SIDEWAYS
    yaw = 6.0 * turn if frontal else _TURNED_DEG.get(thing.kind, 0.0) + (9.0 if sideways else 20.0) * turn
    stance = Stance(x=x, z=0.12 * deep, scale=scale, yaw_deg=yaw, mirrored=mirrored, pose=pose)
    return stand(thing.kind, thing.colour, stance)


def size_of(kind: str, pose: Pose) -> tuple[float, float]:
    """Width and height of a thing in its own units."""
    low, high = _bounds(BUILDERS[kind](pose))
    return high[0] - low[0], high[1]


def stand(kind: str, colour: str, stance: Stance) -> Placed:
    """A thing on the ground, or above it, as `stance` says."""
    parts = BUILDERS[kind](stance.pose)
    low, high = _bounds(parts)
    middle = (low[0] + high[0]) / 2 * stance.scale
    yaw = stance.yaw_deg
    if stance.mirrored:
        yaw, middle = -yaw, -middle
    rgb = [_dye(part.material, colour) for part in parts]
    at = (stance.x - middle, stance.y, stance.z)
    return Placed(parts, rgb, at, stance.scale, yaw, stance.mirrored, low, high)


def _dye(material: Material, colour: str) -> tuple[float, float, float]:
    if material.rgb is None:
        rgb = COLOURS[colour]
    elif material is PALE and colour == "white":
        rgb = _PALE_ON_WHITE
    else:
        rgb = material.rgb
    return (rgb[0] * material.tone / 255, rgb[1] * material.tone / 255, rgb[2] * material.tone / 255)


def _bounds(parts: list[Part]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """A box round all parts: exact for balls and boxes, a little wide for the rest."""
    centre = np.array([part.at for part in parts])
    frame = np.array([part.frame for part in parts])
    half = np.array([_half_extent(part) for part in parts])
    offset = np.array([part.dims[0] / 2 if part.shape is Shape.CAPSULE else 0.0 for part in parts])
    centre = centre + offset[:, None] * frame[:, 1]
    round_ = np.array([part.shape is Shape.ELLIPSOID for part in parts])
    square = (np.abs(frame.transpose(0, 2, 1)) @ half[:, :, None])[:, :, 0]
    oval = np.sqrt(((frame.transpose(0, 2, 1) * half[:, None, :]) ** 2).sum(-1))
    extent = np.where(round_[:, None], oval, square)
    low, high = (centre - extent).min(0), (centre + extent).max(0)
    return (float(low[0]), float(low[1]), float(low[2])), (float(high[0]), float(high[1]), float(high[2]))


def _half_extent(part: Part) -> tuple[float, float, float]:
    a, b, c, d = part.dims
    match part.shape:
        case Shape.ELLIPSOID:
            return (a, b, c)
        case Shape.BOX:
            return (a + d, b + d, c + d)
        case Shape.CONE:
            return (max(b, c) + d, a + d, max(b, c) + d)
        case Shape.CAPSULE:
            thick = max(b, c)
            return (thick, a / 2 + thick, thick)
        case Shape.TORUS:
            return (a + b, b, a + b)
