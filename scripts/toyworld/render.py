"""Scenes to pictures: the one function that the rest of the project calls."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from scripts.toyworld.backgrounds import scatter_dice
from scripts.toyworld.frame import Batch, group_things
from scripts.toyworld.kinds import place_things
from scripts.toyworld.looks import STYLES, Look
from scripts.toyworld.scene import Scene
from scripts.toyworld.shading import draw

PIXELS_AT_ONCE_ON_GPU = 64 * 256 * 256
"""Traced pixels per batch on a GPU: 64 pictures of 128 px, each supersampled twice."""


def render(
    scenes: Sequence[Scene],
    looks: str | Sequence[Look],
    size: int,
    device: str | torch.device = "cpu",
    supersample: float = 2,
) -> Tensor:
    """Pictures uint8 [B, 3, size, size]; the same scenes, looks, size and device give the same bytes.

    `looks` is the name of one, or one look a scene. `supersample` squared rays go into each pixel.
    On a CPU scenes are drawn one by one (rays that are done are then dropped with no padding); on a GPU those of one
    look that follow one another in batches.
    """
    if isinstance(looks, str):
        if looks not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {looks!r}")
        looks = [STYLES[looks]] * len(scenes)
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    where = torch.device(device)
    at_once = 1 if where.type == "cpu" else max(1, int(PIXELS_AT_ONCE_ON_GPU / (size * supersample) ** 2))
    drawn = [torch.empty(0, 3, size, size, dtype=torch.uint8, device=where)]
    for look, pairs in groupby(zip(scenes, looks, strict=True), key=lambda pair: pair[1]):
        alike = [scene for scene, _ in pairs]
        for start in range(0, len(alike), at_once):
            part = alike[start : start + at_once]
            drawn.append(render_batch(part, look, size, where, supersample))
    return torch.cat(drawn)


@torch.no_grad()
def render_batch(scenes: Sequence[Scene], look: Look, size: int, device: torch.device, supersample: float) -> Tensor:
    """The pictures of scenes that are drawn together; what they are drawn with changes a rounding at most."""
    placed = [place_things(scene, frontal=look.pitch_deg == 0) for scene in scenes]
    batch = Batch(
        groups=group_things(placed, device),
        settings=[scene.setting for scene in scenes],
        dice=scatter_dice(scenes, device),
        look=look,
        size=size,
        side=round(size * supersample),
        device=device,
    )
    return (draw(batch).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 3, 1, 2).contiguous()
