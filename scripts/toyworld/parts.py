"""The building blocks of a thing: signed-distance solids with a frame and a material.

Axes: x right, y up, z towards the camera; the ground is y = 0. Kinds are drawn about one unit high and scaled later, so
all lengths here are relative to the thing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

Vec = tuple[float, float, float]
Frame = tuple[Vec, Vec, Vec]  # rows: the part's own axes, in the thing's coordinates

UPRIGHT: Frame = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
UNCUT = 9.0  # a cutting plane so far away that it cuts nothing


class Shape(IntEnum):
    """The primitive solids; their four `dims` mean what the constructors below say."""

    ELLIPSOID = 0
    BOX = 1
    CONE = 2
    CAPSULE = 3
    TORUS = 4


@dataclass(frozen=True)
class Material:
    """How a part looks. `rgb` None: the thing's own colour, times `tone`."""

    name: str
    rgb: tuple[int, int, int] | None
    gloss: float = 0.45
    """0 matt .. 1 polished."""
    glow: float = 0.0
    """Share of the colour that is shown unlit."""
    tone: float = 1.0
    """Lightness factor on the thing's own colour."""


BODY = Material("body", None)
SHADE = Material("shade", None, tone=0.72)  # a second tone of the same colour: roofs, rims
EYE = Material("eye", (252, 252, 252), gloss=0.9, glow=0.25)
IRIS = Material("iris", (112, 74, 52), gloss=0.9)
PUPIL = Material("pupil", (28, 26, 34), gloss=0.9)
GLINT = Material("glint", (255, 255, 255), glow=1.0)
METAL = Material("metal", (158, 166, 178), gloss=0.9)
DARK = Material("dark", (62, 60, 68), gloss=0.5)
SLATE = Material("slate", (96, 92, 106), gloss=0.3)
GLASS = Material("glass", (176, 220, 242), gloss=1.0)
LAMPLIGHT = Material("lamplight", (255, 232, 150), gloss=0.3, glow=0.6)
WOOD = Material("wood", (146, 98, 60), gloss=0.2)
LEAF = Material("leaf", (92, 156, 84), gloss=0.3)
CREAM = Material("cream", (250, 234, 206), gloss=0.35)
PALE = Material("pale", (236, 239, 244), gloss=0.5)
BLUSH = Material("blush", (240, 150, 150), gloss=0.3)
CARROT = Material("carrot", (246, 140, 44), gloss=0.3)


@dataclass(frozen=True)
class Part:
    """One solid: shape, size, where it sits, what it is made of."""

    shape: Shape
    at: Vec
    dims: tuple[float, float, float, float]
    material: Material
    frame: Frame = UPRIGHT
    soft: bool = False
    """Melts into the other soft parts instead of meeting them at a crease."""
    cut: tuple[float, float] = (-UNCUT, UNCUT)
    """Keeps only this span of the part's own y axis; ellipsoids only."""


@dataclass(frozen=True)
class Pose:
    """What a kind may vary, each in -1..1."""

    lift: float
    """Arms, wings, tail: down or up."""
    tilt: float
    """Head or body: leaning left or right."""
    look: float
    """Pupils: left or right."""
    girth: float
    """Slim or plump."""


def turned(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Frame:
    """The frame of a part turned by these degrees about its x, then y, then z axis."""
    a, b, c = math.radians(x), math.radians(y), math.radians(z)
    ca, sa, cb, sb, cc, sc = math.cos(a), math.sin(a), math.cos(b), math.sin(b), math.cos(c), math.sin(c)
    # The columns of Rz @ Ry @ Rx are the turned axes; as rows they take a point into the part's frame.
    return (
        (cc * cb, sc * cb, -sb),
        (cc * sb * sa - sc * ca, sc * sb * sa + cc * ca, cb * sa),
        (cc * sb * ca + sc * sa, sc * sb * ca - cc * sa, cb * ca),
    )


def ball(
    at: Vec,
    radii: float | Vec,
    material: Material = BODY,
    *,
    frame: Frame = UPRIGHT,
    soft: bool = False,
    cut: tuple[float, float] = (-UNCUT, UNCUT),
) -> Part:
    """A sphere or ellipsoid."""
    x, y, z = (radii, radii, radii) if isinstance(radii, (int, float)) else radii
    return Part(Shape.ELLIPSOID, at, (x, y, z, 0.0), material, frame, soft, cut)


def box(
    at: Vec, half: Vec, material: Material = BODY, *, edge: float = 0.02, frame: Frame = UPRIGHT, soft: bool = False
) -> Part:
    """A box of these half lengths whose edges are rounded by `edge`."""
    return Part(Shape.BOX, at, (half[0] - edge, half[1] - edge, half[2] - edge, edge), material, frame, soft)


def cone(
    at: Vec,
    half: float,
    bottom: float,
    top: float,
    material: Material = BODY,
    *,
    edge: float = 0.01,
    frame: Frame = UPRIGHT,
    soft: bool = False,
) -> Part:
    """A frustum about its y axis (a cylinder when bottom = top), `half` its half height, rounded by `edge`."""
    dims = (half - edge, max(bottom - edge, 1e-3), max(top - edge, 1e-3), edge)
    return Part(Shape.CONE, at, dims, material, frame, soft)


def limb(a: Vec, b: Vec, start: float, end: float, material: Material = BODY, *, soft: bool = False) -> Part:
    """A capsule from `a` (radius `start`) to `b` (radius `end`)."""
    along = (b[0] - a[0], b[1] - a[1], b[2] - a[2])
    length = math.sqrt(sum(v * v for v in along)) or 1e-4
    y = (along[0] / length, along[1] / length, along[2] / length)
    seed: Vec = (1.0, 0.0, 0.0) if abs(y[0]) < 0.8 else (0.0, 0.0, 1.0)
    dot = sum(p * q for p, q in zip(seed, y, strict=True))
    x = (seed[0] - dot * y[0], seed[1] - dot * y[1], seed[2] - dot * y[2])
    norm = math.sqrt(sum(v * v for v in x))
    x = (x[0] / norm, x[1] / norm, x[2] / norm)
    z = (x[1] * y[2] - x[2] * y[1], x[2] * y[0] - x[0] * y[2], x[0] * y[1] - x[1] * y[0])
    return Part(Shape.CAPSULE, a, (length, start, end, 0.0), material, (x, y, z), soft)


def ring(at: Vec, radius: float, thick: float, material: Material = BODY, *, frame: Frame = UPRIGHT) -> Part:
    """A torus lying flat about its y axis."""
    return Part(Shape.TORUS, at, (radius, thick, 0.0, 0.0), material, frame)


def eye(at: Vec, radius: float, look: float = 0.0) -> list[Part]:
    """A big friendly eye that faces +z: white, iris, pupil and a catchlight that is a part, so every style shows it."""
    x, y, z = at
    shift = 0.16 * look * radius
    return [
        ball(at, (radius, radius * 1.08, radius * 0.6), EYE),
        ball((x + shift, y - 0.02 * radius, z + radius * 0.33), (radius * 0.62, radius * 0.68, radius * 0.34), IRIS),
        ball((x + shift, y - 0.02 * radius, z + radius * 0.42), (radius * 0.45, radius * 0.5, radius * 0.28), PUPIL),
        ball((x + shift + radius * 0.2, y + radius * 0.27, z + radius * 0.6), radius * 0.21, GLINT),
    ]


def eyes(y: float, z: float, apart: float, radius: float, look: float = 0.0) -> list[Part]:
    """A pair of eyes, `apart` from the middle."""
    return [*eye((-apart, y, z), radius, look), *eye((apart, y, z), radius, look)]


def smile(at: Vec, width: float, thick: float = 0.013) -> list[Part]:
    """A little mouth of two strokes that meet at the bottom."""
    x, y, z = at
    return [
        limb((x - width, y + width * 0.45, z - width * 0.25), (x, y, z), thick, thick, PUPIL),
        limb((x, y, z), (x + width, y + width * 0.45, z - width * 0.25), thick, thick, PUPIL),
    ]
