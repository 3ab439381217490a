"""Rows of the speed table on tiny bases, in seconds on a CPU: whether all commands, of both sides, work."""

from dataclasses import replace
from pathlib import Path

from scripts.bench.speed_rows import Row
from tests.tiny_families import save_family
from tests.tiny_language_models import save_language
from tests.tiny_models import save_captioner

SIDE, LENGTH, STEPS = 64, 128, 8
FAMILIES = {"sdxl": "sdxl", "flux1_dev": "flux"}


def reduced(row: Row, base: Path) -> Row:
    """A few steps of a row on a tiny base, which is made in the folder `base` unless it is there."""
    if not base.exists():
        if row.stage == "caption":
            save_captioner(base)
        elif row.unit == "images":
            save_family(base, FAMILIES.get(row.preset, "sd"))
        else:
            save_language(base)
    size = f"model.resolution={SIDE}" if row.unit == "images" else f"data.length={LENGTH}"
    ours = [
        *row.ours,
        *(["model.quantize=none"] if row.stage == "train" and row.unit == "images" else []),
    ]  # as on GPUs
    ours = [*ours, *([] if row.stage == "caption" else [size]), "hardware.device=cpu", "trainer.precision=fp32"]
    peer = [smaller(word) for word in row.peer]
    return replace(row, ours=tuple(ours), peer=tuple(peer), steps=STEPS)


def smaller(word: str) -> str:
    """A side or a length of a peer's arguments."""
    sizes = {"512": SIDE, "1024": SIDE, "2048": SIDE}
    name, _, value = word.rpartition("=")
    return f"{name}={sizes[value]}" if name == "--resolution" and value in sizes else str(sizes.get(word, word))
