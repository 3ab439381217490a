"""Looks: how a scene is drawn, as independent parameters. Named ones, random ones, and three held out of training."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

SHADINGS = ("flat", "cel", "soft", "glossy", "traced")  # the last marches rays for shadows and occlusion too
MATERIALS = ("natural", "clay", "plastic", "metal", "felt", "paper", "glass")
TEXTURES = ("none", "watercolour", "ink", "crayon", "pencil", "oil", "halftone", "cutout", "mosaic", "pixel")
TEXTURES += ("low-poly", "knitted", "panes")
PALETTES = ("natural", "vivid", "pastel", "muted", "warm", "cool")
BACKGROUNDS = ("full", "pale", "blurred", "dim")
LINES = ("own", "black", "white", "sepia", "navy")


@dataclass(frozen=True)
class Look:
    """The default is the flat look, which a caption without a look's words means."""

    shading: str = "flat"
    material: str = "natural"
    """What the surface does with light; natural leaves each part its own gloss."""
    texture: str = "none"
    """What the picture is made with."""
    palette: str = "natural"
    background: str = "full"
    line: str = "own"
    """Colour of the outlines; own is a darker shade of what they surround."""
    outline: float = 0.006
    """Width, as a share of the picture's; 0 draws none."""
    pitch_deg: float = 0.0
    """From how far above the camera looks down; 0 sees along parallel rays, straight from the front."""
    away: float = 3.6
    """Distance of the camera in half pictures: the smaller, the stronger the perspective."""
    focus: float = 0.0
    """0 all sharp … 1 shallow: all but the things out of focus."""
    turn_deg: float = 0.0
    """The light round the vertical, from in front and aside."""
    height: float = 1.0
    """Of the light; small is low."""
    warmth: float = 0.0
    """Of the light's colour, -1 … 1; 0 is a warm film lamp."""
    softness: float = 1.0
    """Of shadows; small is hard."""


PIXAR = Look("traced", outline=0.0, pitch_deg=8.0, focus=1.0)
STOP_MOTION = Look(
    "traced",
    "clay",
    palette="warm",
    background="dim",
    outline=0.0,
    pitch_deg=13.0,
    focus=0.6,
    turn_deg=40.0,
    height=0.7,
    softness=0.4,
)
STAINED_GLASS = Look("soft", "glass", "panes", "vivid", line="black", outline=0.016)
HELD_OUT: dict[str, Look] = {"pixar": PIXAR, "stop motion": STOP_MOTION, "stained glass": STAINED_GLASS}
"""By the words of their recipes. Neither these nor looks close to them may be trained on by autoencoder or base."""
LEAST_DISTANCE = 2.5
ALIKE = 64
UNNAMED_SHARE = 0.6
# Of the unnamed. Each takes twice the time, but bodies seen from above, with shadows, are the hardest to draw, and of
# them the named looks show little.
TRACED_SHARE = 0.6
FRONTAL_SHARE = 0.3

NAMED: dict[str, Look] = {
    "flat": Look(),
    "cartoon": Look("flat", palette="vivid", line="black", outline=0.014),
    "cel shaded": Look("cel", palette="vivid", background="pale", line="navy", outline=0.007, turn_deg=-20.0),
    "watercolour": Look("soft", "paper", "watercolour", outline=0.0, warmth=-0.3),
    "ink": Look("flat", "paper", "ink", line="sepia", outline=0.008),
    "crayon": Look("flat", "paper", "crayon", "vivid", outline=0.016),
    "pencil": Look("soft", "paper", "pencil", line="black", outline=0.006),
    "oil": Look("soft", "natural", "oil", "warm", outline=0.0),
    "comic": Look("cel", "natural", "halftone", "vivid", line="black", outline=0.014),
    "paper cut": Look("flat", "paper", "cutout", "pastel", line="white", outline=0.014),
    "mosaic": Look("flat", "natural", "mosaic"),
    "pixel": Look("flat", "natural", "pixel", line="black", outline=0.016),
    "low poly": Look("glossy", "paper", "low-poly", "natural", outline=0.0, pitch_deg=12.0, away=5.0),
    "knitted": Look("soft", "felt", "knitted", "warm", outline=0.006),
    "clay": Look("soft", "clay", palette="pastel", outline=0.0, pitch_deg=5.0, warmth=0.4),
    "plastic": Look("glossy", "plastic", palette="vivid", background="pale", outline=0.0, warmth=-0.6, height=1.4),
    "felt": Look("soft", "felt", palette="muted", background="blurred", outline=0.0, pitch_deg=10.0, away=6.0),
    "metal": Look("glossy", "metal", palette="cool", background="dim", outline=0.0, pitch_deg=4.0, away=6.0),
    "crystal": Look("glossy", "glass", palette="cool", background="blurred", outline=0.0, pitch_deg=6.0, away=5.0),
    "diorama": Look(
        "traced",
        "paper",
        palette="vivid",
        outline=0.0,
        pitch_deg=24.0,
        away=8.0,
        warmth=0.8,
        softness=0.25,
        turn_deg=50.0,
    ),
}

STYLES: dict[str, Look] = NAMED | HELD_OUT
"""Every look that has a name."""


def random_look(rng: random.Random) -> Look:
    """Every parameter drawn by itself, again where the whole comes too close to a look held out."""
    while True:
        traced = rng.random() < TRACED_SHARE
        frontal = rng.random() < FRONTAL_SHARE
        outline = rng.choice((0.0, 0.0, 0.006, 0.01, 0.016))
        look = Look(
            shading="traced" if traced else rng.choice(SHADINGS[:-1]),
            material=rng.choice(MATERIALS),
            texture=rng.choice(TEXTURES) if rng.random() < 0.5 else "none",
            palette=rng.choice(PALETTES),
            background=rng.choice(BACKGROUNDS),
            # What would not show must not count as a difference.
            line=rng.choice(LINES) if outline else Look.line,
            outline=outline,
            pitch_deg=0.0 if frontal else rng.uniform(3.0, 22.0),
            away=Look.away if frontal else rng.uniform(3.0, 9.0),
            focus=rng.choice((0.0, 0.0, rng.random())),
            turn_deg=rng.uniform(-70.0, 70.0),
            height=rng.uniform(0.4, 1.6),
            warmth=rng.uniform(-1.0, 1.0),
            softness=rng.uniform(0.2, 1.5),
        )
        if to_held_out(look) >= LEAST_DISTANCE:
            return look


def training_look(seed: int) -> Look:
    """The look of a scene's picture in a training set of many looks: a named one, or in six of ten an unnamed one.

    Scenes that follow one another share it, so that a GPU can draw them together.
    """
    rng = random.Random(f"toyworld look {seed // ALIKE}")
    return random_look(rng) if rng.random() < UNNAMED_SHARE else rng.choice(list(NAMED.values()))


_RANGES = {"outline": 0.02, "pitch_deg": 22.0, "away": 6.0, "focus": 1.0, "turn_deg": 140.0, "height": 1.2}
_RANGES |= {"warmth": 2.0, "softness": 1.3}


def distance(one: Look, other: Look) -> float:
    """Parameters that differ: 1 for another word, the share of its range for a number."""
    total = 0.0
    for field in fields(Look):
        a, b = getattr(one, field.name), getattr(other, field.name)
        total += abs(a - b) / _RANGES[field.name] if field.name in _RANGES else float(a != b)
    return total


def to_held_out(look: Look) -> float:
    """Distance to the nearest look that is held out of training."""
    return min(distance(look, held_out) for held_out in HELD_OUT.values())
