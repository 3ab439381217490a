"""How often the images of a folder are read, hashed and decoded by the stages `caption` and `dataset`.

    python -m scripts.bench.images --images 10000

writes that many small images with captions into a temporary folder and prints a table: the first run, one with nothing
to do, and one after a single image has changed.
"""

import argparse
import builtins
import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageFile

from finetune import api
from finetune.config.schema import Config
from finetune.data.images import index
from finetune.diffusion import encode
from finetune.stages.caption import caption
from finetune.stages.dataset import dataset

SIDE = 64  # pixels; also model.resolution
CAPTIONS = ("a red robot", "a blue boat at sea", "a green cup in the snow")
LONG_AGO_S = 3600  # images of a data set are older than a run on them


@dataclass
class Counts:
    """What one run did: seconds, image files opened, their bytes, content hashes, decoded images."""

    seconds: float = 0.0
    files: int = 0
    bytes_read: int = 0
    hashes: int = 0
    decodes: int = 0

    def row(self, name: str) -> str:
        """A line of the table."""
        read = f"{self.bytes_read / 2**20:.1f}"
        return f"| {name} | {self.seconds:.1f} | {self.files:,} | {read} | {self.hashes:,} | {self.decodes:,} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    count = parser.parse_args().images
    with tempfile.TemporaryDirectory() as work:
        settings = [f"data.folder={work}/images", f"data.cache={work}/cache", f"run_dir={work}/run"]
        config = api.load("pixar_style", [*settings, f"model.resolution={SIDE}", "caption.trigger=''"])
        write_images(Path(config.data.folder), count)
        print("| run | seconds | files read | MiB read | hashes | decodes |\n|---|---|---|---|---|---|")
        print(counts_of(config).row(f"first, {count:,} images"), flush=True)
        print(counts_of(config).row("nothing to do"), flush=True)
        write_image(Path(config.data.folder) / "00000.png", seed=count)
        print(counts_of(config).row("one image changed"), flush=True)


def write_images(folder: Path, count: int) -> None:
    """So many different images with their captions in `metadata.jsonl`."""
    folder.mkdir(parents=True)
    names = [f"{number:05d}.png" for number in range(count)]
    for seed, name in enumerate(names):
        write_image(folder / name, seed)
    rows = [{"file_name": name, "text": CAPTIONS[seed % len(CAPTIONS)]} for seed, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_image(path: Path, seed: int) -> None:
    """Coloured noise, last changed an hour ago and `seed` ms."""
    values_HW3 = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(values_HW3).save(path)
    changed = time.time() - LONG_AGO_S - seed / 1000
    os.utime(path, (changed, changed))


def counts_of(config: Config) -> Counts:
    """Run both stages."""
    start = time.monotonic()
    with counting(Path(config.data.folder)) as counts:
        dataset(config, caption(config))
    counts.seconds = time.monotonic() - start
    return counts


@contextmanager
def counting(folder: Path) -> Iterator[Counts]:
    """Count what is done to the image files of a folder while the block runs."""
    counts, lock = Counts(), threading.Lock()
    plain_open, plain_hash, plain_load = builtins.open, index.content_hash, ImageFile.ImageFile.load

    def open_file(file: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(file, str | Path) and Path(file).suffix == ".png" and Path(file).is_relative_to(folder):
            with lock:
                counts.files += 1
                counts.bytes_read += Path(file).stat().st_size
        return plain_open(file, *arguments, **options)

    def content_hash(data: bytes) -> str:
        with lock:
            counts.hashes += 1
        return plain_hash(data)

    def load(image: ImageFile.ImageFile) -> Any:
        with lock:
            counts.decodes += bool(image.tile)  # Pillow empties it once the pixels are there
        return plain_load(image)

    with (
        patch.object(builtins, "open", open_file),
        patch.object(io, "open", open_file),
        patch.object(index, "content_hash", content_hash),
        patch.object(encode, "content_hash", content_hash),
        patch.object(ImageFile.ImageFile, "load", load),
    ):
        yield counts


if __name__ == "__main__":
    main()
