"""What the phases share: where files live, how long each phase trains and how large its parts are."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from scripts.toyworld.looks import STYLES

PICTURE_PX = 128
LATENT_CHANNELS = 16  # of 32 the decoder used 15; eight left an eye, a few pixels in one 8×8 patch, too little room
CAPTION_VARIANTS = 8
TEXT_WIDTH = 192
SEED = 20_26

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class RenderSet:
    """One cached set of renders. Seeds of different sets never meet."""

    name: str
    look: str | None
    """Its name; None draws many, as `training_look` has them."""
    first_seed: int
    seeds: int
    """Scenes drawn; a training set keeps about nine in ten, the held-out combinations are left out."""
    for_training: bool
    things: int | None = None
    """Things in each scene; None leaves it to the scene's seed."""
    crowded: bool = False
    """Of crowds instead, which have no caption."""


BASE_SETS = ("flat", "looks")
"""What autoencoder and diffusion model learn from: none of the looks held out."""
CROWD, CROWD_UNSEEN = "crowd", "crowd-unseen"
FULL_SETS = (
    RenderSet("flat", "flat", 0, 50_000, for_training=True),
    RenderSet("looks", None, 500_000_000, 170_000, for_training=True),
    RenderSet("pixar", "pixar", 10_000_000, 7_000, for_training=True),
    RenderSet("stop motion", "stop motion", 20_000_000, 2_500, for_training=True),
    RenderSet("stained glass", "stained glass", 30_000_000, 2_500, for_training=True),
    RenderSet("flat-unseen", "flat", 40_000_000, 500, for_training=False, things=1),
    RenderSet("pixar-unseen", "pixar", 50_000_000, 500, for_training=False, things=1),
    RenderSet(CROWD, None, 400_000_000, 60_000, for_training=True, crowded=True),
    RenderSet(CROWD_UNSEEN, None, 100_000_000, 64 * len(STYLES), for_training=False, crowded=True),
    *(
        RenderSet(f"{name}-unseen", name, 60_000_000 + 1_000_000 * index, 120, for_training=False, things=1)
        for index, name in enumerate(name for name in STYLES if name not in ("flat", "pixar"))
    ),
)
TINY_SEEDS = {"looks": 160, CROWD_UNSEEN: len(STYLES)}
TINY_SETS = tuple(replace(full, seeds=TINY_SEEDS.get(full.name, 24 if full.for_training else 4)) for full in FULL_SETS)

FULL_MINUTES = {
    "render": 12.0,
    "readers": 2.0,
    "autoencoder": 3.0,
    "decoder": 2.0,
    "captioner": 3.2,
    "diffusion": 9.0,
    "detector": 8.0,
}

PARTS = ("readers", "captioner", "autoencoder", "diffusion", "detector")
"""What a rebuild trains from scratch, or takes as the repository ships it."""


@dataclass(frozen=True)
class Settings:
    """One call's wishes. A tiny run walks the same path with a few pictures and steps, to prove the line on a CPU."""

    work: Path
    """Caches, checkpoints and unexported models."""
    root: Path
    """Where the artefacts go: finetune/embedded and tests/readers below it."""
    device: str
    tiny: bool
    minutes: dict[str, float] = field(default_factory=lambda: dict(FULL_MINUTES))
    kept: frozenset[str] = frozenset()
    """Parts that start as shipped: autoencoder and diffusion model may be trained on, the others stay so."""
    pause_at: float = math.inf
    """When rendering and trainings pause, as time.time() counts, to be continued by another call."""

    @property
    def sets(self) -> tuple[RenderSet, ...]:
        """Only readers, captioner and detector learn from the looks held out, and only the detector from crowds."""
        sets = TINY_SETS if self.tiny else FULL_SETS
        if "detector" not in self.kept:
            return sets
        sets = tuple(entry for entry in sets if not entry.crowded)
        if {"readers", "captioner"} <= self.kept:
            return tuple(entry for entry in sets if entry.name in BASE_SETS or not entry.for_training)
        return sets

    @property
    def on_gpu(self) -> bool:
        """There the models compute in bf16, which CPUs mostly do many times slower than fp32."""
        return self.device.startswith("cuda")

    @property
    def tiny_steps(self) -> int | None:
        """Optimiser steps of each phase in a tiny run; None where time is the limit."""
        return 4 if self.tiny else None

    def batch(self, pictures: int) -> int:
        """Pictures drawn for a step."""
        return 8 if self.tiny else pictures

    @property
    def embedded(self) -> Path:
        return self.root / "finetune" / "embedded"

    @property
    def readers(self) -> Path:
        return self.root / "tests" / "readers"

    @property
    def evaluation(self) -> Path:
        return self.work / "evaluation"
