"""What rows of the speed table work on beside the example data: photographs' sizes, rows of many lengths."""

import json
import math
import random
from pathlib import Path

from PIL import Image

from scripts.bench.memory import DIFFUSION
from scripts.toytalk.compose import sample_conversation

SEEDS = 300_000_000  # that nothing else uses
SIDE = 1024  # pixels
ROWS, MEDIAN, SPREAD = 4000, 200, 0.5  # conversations, tokens of the middle one, of the logarithm of the lengths
LETTERS_A_TOKEN = 3.2  # of the tokenizer that comes with the package, in these conversations


def photos(folder: Path, count: int) -> Path:
    """So many JPEGs of SIDE px, each another piece of an example image."""
    if not folder.exists():
        folder.mkdir(parents=True)
        draw, shown = random.Random(0), [Image.open(file).convert("RGB") for file in sorted(DIFFUSION.glob("*.jpg"))]
        for number in range(count):
            image = shown[number % len(shown)]
            side = min(image.size)
            piece = round(side * draw.uniform(0.6, 0.95))
            left, top = (draw.randrange(side - piece) for _ in range(2))
            cut = image.crop((left, top, left + piece, top + piece)).resize((SIDE, SIDE))
            cut.save(folder / f"{number:05}.jpg", quality=90)
    (folder / "metadata.jsonl").unlink(missing_ok=True)  # captions of a measurement before
    return folder


def short_conversations(file: Path) -> Path:
    """ROWS conversations whose lengths are spread as people's are: most short, a few long."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        draw, seed, lines = random.Random(0), SEEDS, []
        for _ in range(ROWS):
            letters, turns = LETTERS_A_TOKEN * draw.lognormvariate(math.log(MEDIAN), SPREAD), []
            while sum(len(turn["content"]) for turn in turns) < letters:
                turns += [turn for turn in sample_conversation(seed).messages if turn["role"] != "system"][:2]
                seed += 1
            lines.append(json.dumps({"messages": turns}) + "\n")
        file.write_text("".join(lines))
    return file
