"""Scenes to pictures: the one function that the rest of the project calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scripts.toyworld import film, styles
from scripts.toyworld.backgrounds import scatter_dice
from scripts.toyworld.frame import group_things
from scripts.toyworld.kinds import place_things
from scripts.toyworld.scene import Scene

_DRAW: dict[str, Callable[[styles.Batch], Tensor]] = {
    "flat": styles.flat,
    "pixar": film.pixar,
    "ink": styles.ink,
    "mosaic": styles.mosaic,
}
STYLES: tuple[str, ...] = tuple(_DRAW)
_FRONTAL_STYLES = frozenset(("flat", "mosaic"))

PIXELS_AT_ONCE_ON_GPU = 64 * 256 * 256
"""Traced pixels per batch on a GPU: 64 pictures of 128 px, each supersampled twice."""


def render(
    scenes: Sequence[Scene], style: str, size: int, device: str | torch.device = "cpu", supersample: int = 2
) -> Tensor:
    """Pictures uint8 [B, 3, size, size]; the same scenes, style, size and device give the same bytes.

    `supersample` squared rays go into each pixel. On a CPU scenes are drawn one by one (rays that are done are then
    dropped with no padding); on a GPU in batches.
    """
    if style not in _DRAW:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    where = torch.device(device)
    at_once = 1 if where.type == "cpu" else max(1, PIXELS_AT_ONCE_ON_GPU // (size * supersample) ** 2)
    drawn = [
        render_batch(scenes[start : start + at_once], style, size, where, supersample)
        for start in range(0, len(scenes), at_once)
    ]
    return torch.cat(drawn) if drawn else torch.empty(0, 3, size, size, dtype=torch.uint8, device=where)


@torch.no_grad()
def render_batch(scenes: Sequence[Scene], style: str, size: int, device: torch.device, supersample: int) -> Tensor:
    """The pictures of scenes that are drawn together; what they are drawn with changes a rounding at most."""
    placed = [place_things(scene, frontal=style in _FRONTAL_STYLES) for scene in scenes]
    batch = styles.Batch(
        groups=group_things(placed, device),
        settings=[scene.setting for scene in scenes],
        dice=scatter_dice(scenes, device),
        size=size,
        supersample=supersample,
        device=device,
    )
    picture = _DRAW[style](batch)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 3, 1, 2).contiguous()
