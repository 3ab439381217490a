"""Scenes to pictures: the one function that the rest of the project calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from scripts.toyworld.backgrounds import scatter_dice
from scripts.toyworld.crowd import Crowd
from scripts.toyworld.frame import Batch, group_things
from scripts.toyworld.kinds import Placed, place_things
from scripts.toyworld.looks import STYLES, Look
from scripts.toyworld.scene import Scene
from scripts.toyworld.shading import draw

PIXELS_AT_ONCE_ON_GPU = 64 * 256 * 256
"""Traced pixels per batch on a GPU: 64 pictures of 128 px, each supersampled twice."""


def render(
    scenes: Sequence[Scene | Crowd],
    looks: str | Sequence[Look],
    size: int,
    device: str | torch.device = "cpu",
    supersample: float = 2,
) -> Tensor:
    """Pictures uint8 [B, 3, size, size]; the same scenes, looks, size and device give the same bytes.

    `looks` is the name of one, or one look a scene. `supersample` squared rays go into each pixel.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    side = round(size * supersample)
    drawn = [torch.empty(0, 3, size, size, dtype=torch.uint8, device=device)]
    for batch in batches(scenes, looks, size, side, torch.device(device)):
        drawn.append(picture(batch))
    return torch.cat(drawn)


def batches(
    scenes: Sequence[Scene | Crowd], looks: str | Sequence[Look], size: int, side: int, device: torch.device
) -> Iterator[Batch]:
    """Scenes in their order, made ready to be traced at `side` pixels and drawn at `size`.

    On a CPU scenes come one by one (rays that are done are then dropped with no padding); on a GPU those of one look
    that follow one another together.
    """
    if isinstance(looks, str):
        if looks not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {looks!r}")
        looks = [STYLES[looks]] * len(scenes)
    at_once = 1 if device.type == "cpu" else max(1, PIXELS_AT_ONCE_ON_GPU // side**2)
    for look, pairs in groupby(zip(scenes, looks, strict=True), key=lambda pair: pair[1]):
        alike = [scene for scene, _ in pairs]
        for start in range(0, len(alike), at_once):
            yield batch_of(alike[start : start + at_once], look, size, side, device)


def batch_of(scenes: Sequence[Scene | Crowd], look: Look, size: int, side: int, device: torch.device) -> Batch:
    """Scenes that are drawn together; what they are drawn with changes a rounding at most."""
    return Batch(
        groups=group_things([placed_things(scene, frontal=look.pitch_deg == 0) for scene in scenes], device),
        settings=[scene.setting for scene in scenes],
        dice=scatter_dice(scenes, device),
        look=look,
        size=size,
        side=side,
        device=device,
    )


def placed_things(scene: Scene | Crowd, *, frontal: bool) -> list[Placed]:
    if isinstance(scene, Crowd):
        return [thing.placed for thing in scene.things]
    return place_things(scene, frontal=frontal)


@torch.no_grad()
def picture(batch: Batch) -> Tensor:
    """uint8 [B, 3, size, size]."""
    return (draw(batch).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 3, 1, 2).contiguous()
