"""Renders the training and test sets in chunks, cached as uint8, and loads them back.

N pictures of 3×P×P pixels.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scripts.embedded.fit import save_atomically
from scripts.embedded.settings import CAPTION_VARIANTS, PICTURE_PX, RenderSet, Settings
from scripts.toyworld.captions import caption
from scripts.toyworld.render import render
from scripts.toyworld.scene import Scene, held_out, sample_scene

CHUNK_SEEDS = 500


@dataclass(frozen=True)
class Pictures:
    """A set in memory: images [N, 3, P, P] as uint8 on the device, and the scene of each."""

    images: Tensor
    scenes: list[Scene]

    def captions(self) -> list[list[str]]:
        """Every variant of every picture's caption, [N][CAPTION_VARIANTS]."""
        return [[caption(scene, variant) for variant in range(CAPTION_VARIANTS)] for scene in self.scenes]

    def single_things(self) -> "Pictures":
        """The pictures that show one thing alone."""
        keep = [index for index, scene in enumerate(self.scenes) if len(scene.things) == 1]
        rows = torch.tensor(keep, device=self.images.device)
        return Pictures(self.images[rows], [self.scenes[index] for index in keep])


def render_sets(settings: Settings) -> None:
    """Render what is missing, set by set in turn, so that a spent budget leaves every set in proportion."""
    started, deadline_s = time.monotonic(), settings.minutes["render"] * 60
    for whole, part in chunks_in_turn(settings.sets):
        path = chunk_path(settings.work, whole, part)
        if path.exists():
            continue
        # The test sets are never cut short: figures are only comparable over the same pictures.
        if whole.for_training and time.monotonic() - started > deadline_s:
            print(f"render: out of time before {path.name}; training uses what is there", flush=True)
            continue
        before = time.monotonic()
        scenes = chunk_scenes(whole, part)
        save_atomically(render(scenes, whole.style, PICTURE_PX, device=settings.device).cpu(), path)
        rate = len(scenes) / (time.monotonic() - before)
        print(f"render: {path.name}  {len(scenes)} pictures  {rate:.0f}/s", flush=True)


def chunks_in_turn(sets: tuple[RenderSet, ...]) -> list[tuple[RenderSet, int]]:
    """All (set, chunk) pairs, ordered by the share of their own set that precedes them; test sets first."""
    keyed = []
    for whole in sets:
        parts = -(-whole.seeds // CHUNK_SEEDS)
        keyed += [(whole.for_training, part / parts, whole.first_seed, whole, part) for part in range(parts)]
    return [(whole, part) for _, _, _, whole, part in sorted(keyed, key=lambda entry: entry[:3])]


def chunk_scenes(whole: RenderSet, part: int) -> list[Scene]:
    first = whole.first_seed + part * CHUNK_SEEDS
    stop = min(first + CHUNK_SEEDS, whole.first_seed + whole.seeds)
    scenes = [sample_scene(seed, things=whole.things) for seed in range(first, stop)]
    return [scene for scene in scenes if not (whole.for_training and held_out(scene))]


def chunk_path(work: Path, whole: RenderSet, part: int) -> Path:
    return work / "renders" / f"{whole.name}-{part:03d}.pt"


def load_set(settings: Settings, name: str) -> Pictures:
    """The rendered part of a set, on the device."""
    whole = next(entry for entry in settings.sets if entry.name == name)
    images: list[Tensor] = []
    scenes: list[Scene] = []
    for part in range(-(-whole.seeds // CHUNK_SEEDS)):
        path = chunk_path(settings.work, whole, part)
        if path.exists():
            images.append(torch.load(path))
            scenes += chunk_scenes(whole, part)
    if not images:
        raise FileNotFoundError(f"no renders of '{name}' in {settings.work / 'renders'}; run the phase 'render' first")
    return Pictures(torch.cat(images).to(settings.device), scenes)


def join(sets: list[Pictures]) -> Pictures:
    return Pictures(
        torch.cat([pictures.images for pictures in sets]),
        [scene for pictures in sets for scene in pictures.scenes],
    )
