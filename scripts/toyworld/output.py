"""Pictures to disk: contact sheets, and the example data set with its README."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from scripts.toyworld.captions import caption
from scripts.toyworld.render import render
from scripts.toyworld.scene import COLOURS, KINDS, PLACES, SETTINGS, SIZES, Scene, Thing

DATASET_SEED = 9_000_000
"""First seed of the data set's scenes: far from any seed that a base model is trained on."""
PAIR_EVERY = 8  # every eighth picture shows two things
JPEG_QUALITY = 95
DATASET_SUPERSAMPLE = 3  # only a few pictures, looked at closely

_LOOKS_OF = {"pixar": "a 3-D animated film", "stop motion": "a stop-motion film", "stained glass": "stained glass"}

_WITHOUT_CAPTIONS = "They come without captions, like a folder of your own images."
_WITH_CAPTIONS = "A text file beside each says what it shows."
_README = """# {name}

{count} images ({size} x {size} px, JPEG) of small scenes in the look of {look}. They are the example data
for a style adapter. {captions}

Made by the project's own procedural renderer (`scripts/toyworld/`):

    python -m scripts.toyworld dataset datasets/{name} {options}

Nothing is taken from a film or a photograph, and no studio is involved. The scenes are spread evenly over kinds,
colours and settings; no base model trains on their seeds.

Licence: CC0 1.0, public domain.
"""


def write_sheet(
    path: Path, scenes: Sequence[Scene], style: str, size: int, *, columns: int = 6, device: str = "cpu"
) -> None:
    """One PNG with all scenes, row by row."""
    pictures = render(scenes, style, size, device=device).cpu()
    rows = -(-len(scenes) // columns)
    sheet = torch.full((3, rows * size, columns * size), 255, dtype=torch.uint8)
    for k, picture in enumerate(pictures):
        top, left = k // columns * size, k % columns * size
        sheet[:, top : top + size, left : left + size] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    _image(sheet).save(path)


def write_dataset(
    folder: Path, *, style: str, count: int, size: int, captions: bool = False, device: str = "cpu"
) -> None:
    """Numbered JPEGs in one of the looks held out of training, their captions in text files if wanted, a README."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(dataset_scenes(count), start=1):
        picture = render([scene], style, size, device=device, supersample=DATASET_SUPERSAMPLE)[0].cpu()
        _image(picture).save(folder / f"{number:03d}.jpg", quality=JPEG_QUALITY, optimize=True)
        if captions:
            (folder / f"{number:03d}.txt").write_text(f"{caption(scene)}, {style} style\n", encoding="utf-8")
    options = "" if style == "pixar" else f'--style "{style}" '
    options += f"--count {count} --size {size}" + " --captions" * captions
    readme = _README.format(
        name=folder.name,
        count=count,
        size=size,
        look=_LOOKS_OF[style],
        options=options,
        captions=_WITH_CAPTIONS if captions else _WITHOUT_CAPTIONS,
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def dataset_scenes(count: int) -> list[Scene]:
    """Scenes that use each kind, colour, setting, size and place as evenly as `count` allows, mostly one thing each."""
    rng = random.Random(f"toyworld data set {DATASET_SEED}")
    pairs = count // PAIR_EVERY
    kinds, colours, sizes = (_dealt(words, count + pairs, rng) for words in (KINDS, tuple(COLOURS), ("big", *SIZES)))
    settings, places = _dealt(SETTINGS, count, rng), _dealt(PLACES, count, rng)
    scenes: list[Scene] = []
    for k in range(count):
        paired = k % PAIR_EVERY == PAIR_EVERY - 1
        first = Thing(kinds.pop(), colours.pop(), sizes.pop(), "left" if paired else places[k])
        things = [first]
        if paired:
            other = next(kind for kind in reversed(kinds) if kind != first.kind)
            kinds.remove(other)
            things.append(Thing(other, colours.pop(), sizes.pop(), "right"))
        scenes.append(Scene(tuple(things), settings[k], DATASET_SEED + k))
    return scenes


def _dealt(words: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` words, each as often as the others, give or take one, in random order."""
    out: list[str] = []
    while len(out) < count:
        out += rng.sample(words, len(words))
    return out[:count]


def _image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
