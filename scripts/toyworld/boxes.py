"""Where the things of a picture are: the box round what each one shows, from the geometry it is drawn by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.toyworld.crowd import Crowd
from scripts.toyworld.frame import trace
from scripts.toyworld.looks import Look
from scripts.toyworld.render import batches
from scripts.toyworld.scene import Scene

LEAST_SIDE = 0.05
"""Of the picture's: what shows less behind another thing is no thing to find."""


@dataclass(frozen=True)
class Box:
    """What shows of a thing: left, top, right, bottom as shares of the picture's side."""

    kind: str
    edges: tuple[float, float, float, float]


@torch.no_grad()
def boxes(
    scenes: Sequence[Scene | Crowd], looks: str | Sequence[Look], size: int, device: str | torch.device = "cpu"
) -> list[list[Box]]:
    """The boxes of each scene's things as `render` shows them at this size, in the order of the scene's things."""
    found: list[list[Box]] = []
    for batch in batches(scenes, looks, size, size, torch.device(device)):
        numbers = trace(batch, None).thing_BN.unflatten(1, (size, size))
        found += [[] for _ in batch.settings]
        extents = [_extents(numbers == slot + 1) for slot in range(len(batch.groups))]
        first = len(found) - len(batch.settings)
        for row in range(len(batch.settings)):
            for slot, thing in enumerate(scenes[first + row].things):
                left, top, right, bottom = extents[slot][row]
                if min(right - left, bottom - top) >= LEAST_SIDE * size:
                    edges = (left / size, top / size, right / size, bottom / size)
                    found[first + row].append(Box(thing.kind, edges))
    return found


def _extents(shown_BSS: Tensor) -> list[list[int]]:
    """left, top, right and bottom of each mask in pixels, right and bottom beyond it; zeros for an empty one."""
    sides = []
    for seen_BS in (shown_BSS.any(1), shown_BSS.any(2)):  # columns, rows
        length = seen_BS.shape[1]
        first, last = seen_BS.int().argmax(1), length - seen_BS.flip(1).int().argmax(1)
        some = seen_BS.any(1)
        sides += [first * some, last * some]
    left, right, top, bottom = sides
    return torch.stack([left, top, right, bottom], 1).tolist()
