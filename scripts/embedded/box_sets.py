"""The boxes of the rendered sets, computed once from each scene's geometry and cached beside the pictures.

N pictures, K things at most in one.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scripts.embedded.fit import save_atomically
from scripts.embedded.render_sets import chunk_path, chunk_scenes, chunks_in_turn, load_set, set_looks, work_off
from scripts.embedded.settings import PICTURE_PX, RenderSet, Settings
from scripts.toyworld.boxes import boxes
from scripts.toyworld.crowd import MOST_THINGS
from scripts.toyworld.looks import Look
from scripts.toyworld.scene import KINDS

NO_THING = -1


@dataclass(frozen=True)
class Labelled:
    """Pictures [N, 3, P, P] as uint8, their things' edges [N, K, 4] (left, top, right, bottom, 0…1) and kinds [N, K]
    by their place in KINDS, -1 where there is none; on the device. And the look of each."""

    images: Tensor
    edges: Tensor
    kinds: Tensor
    looks: list[Look]


def find_boxes(settings: Settings, names: list[str]) -> None:
    """The boxes of every rendered chunk of these sets, however long it takes: a picture without them is useless."""
    chunks = [
        (whole, part)
        for whole, part in chunks_in_turn(settings.sets)
        if whole.name in names and chunk_path(settings.work, whole, part).exists()
    ]
    work_off(settings, find_chunk, chunks, boxes_path, math.inf, name="boxes")


def find_chunk(settings: Settings, whole: RenderSet, part: int, device: str) -> None:
    scenes = chunk_scenes(whole, part)
    edges_NK4 = torch.zeros(len(scenes), MOST_THINGS, 4)
    kinds_NK = torch.full((len(scenes), MOST_THINGS), NO_THING)
    for row, found in enumerate(boxes(scenes, set_looks(whole, scenes), PICTURE_PX, device)):
        for slot, box in enumerate(found):
            edges_NK4[row, slot] = torch.tensor(box.edges)
            kinds_NK[row, slot] = KINDS.index(box.kind)
    save_atomically({"edges": edges_NK4, "kinds": kinds_NK}, boxes_path(settings.work, whole, part))


def boxes_path(work: Path, whole: RenderSet, part: int) -> Path:
    return work / "boxes" / f"{whole.name}-{part:03d}.pt"


def load_labelled(settings: Settings, name: str) -> Labelled:
    """The rendered part of a set with its boxes, which `find_boxes` has found."""
    pictures = load_set(settings, name)
    whole = next(entry for entry in settings.sets if entry.name == name)
    parts = [part for _, part in chunks_in_turn((whole,)) if chunk_path(settings.work, whole, part).exists()]
    found = [torch.load(boxes_path(settings.work, whole, part)) for part in parts]
    edges_NK4, kinds_NK = (torch.cat([part[key] for part in found]).to(settings.device) for key in ("edges", "kinds"))
    return Labelled(pictures.images, edges_NK4, kinds_NK, pictures.looks)
