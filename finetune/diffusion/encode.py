"""Captioned images -> encoded examples of a latent diffusion model, one frozen encoder in memory at a time.

B images, 3 colours, H×W pixels of the bucket.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from finetune.config.describe import as_dict
from finetune.config.schema import Config
from finetune.data.cache import Cache, key_of, missing
from finetune.data.images import buckets, decode, folder
from finetune.diffusion.families.spec import TEXT_BATCH
from finetune.diffusion.pipeline import (
    base_hash,
    load_text_encoder,
    load_vae,
    text_encoder_hash,
    vae_hash,
)
from finetune.errors import DataError
from finetune.memory.device import pick_device, release_memory
from finetune.run.atomic import write_atomically
from finetune.run.progress import progress, say
from finetune.run.records import CaptionSet, Dataset, Example

GEOMETRY = "lanczos-1"  # part of every image's key: change it when the same bucket and crop would give other pixels
PIXELS_PER_BATCH = 512 * 512  # of one VAE batch: fills a GPU already; more would only cost memory
SMALLEST_SPLIT = 20  # images; of fewer, holding some out costs more than the validation loss tells
DECODE_THREADS = 4


@dataclass(frozen=True)
class SourceImage:
    """One image before encoding: its content hash, caption, and how it is cut. `crop` in upright original pixels."""

    file: str
    sha256: str
    caption: str
    bucket: buckets.Bucket
    crop: tuple[int, int, int, int]
    upscaled: bool


def inputs(config: Config, captions: CaptionSet | None) -> list[Any]:
    """Images and captions by content, the encoders, and everything that decides how images are cut."""
    assert captions is not None
    files = [item.file for item in captions.items]
    model = config.model
    return [
        folder.content_hashes(Path(captions.folder), files),
        {item.file: item.text for item in captions.items},
        as_dict(config)["data"],
        [
            model.kind,
            model.family,
            base_hash(model),
            model.resolution,
            model.bucket_step,
            config.caption.trigger,
        ],
    ]


def complete(record: Dataset) -> bool:
    """Whether the index and every entry that it names are still there."""
    if not Path(record.index).is_file():
        return False
    wanted = {Path(record.empty_text)}
    lines = 0
    for example in record.examples():
        lines += 1
        wanted |= {Path(example.latents), Path(example.text)}
    return lines == record.train + record.validation and not missing(wanted)


def figures(record: Dataset) -> dict[str, float | int | str | None]:
    """For the receipt."""
    return {
        "train": record.train,
        "validation": record.validation,
        "buckets": ", ".join(f"{name}: {count}" for name, count in record.buckets.items()),
        "upscaled": record.upscaled,
        "encoded": record.encoded,
        "cached": record.cached,
    }


def build(config: Config, captions: CaptionSet | None) -> Dataset:
    """Encode what the cache lacks, write `dataset.jsonl` into the run folder (one line an example, sorted by file).

    Raises DataError naming every unreadable image (left out with a warning under `data.skip_bad`).
    """
    assert captions is not None
    root, cache = Path(captions.folder), Cache(Path(config.data.cache))
    identity = vae_hash(config.model)
    images = _read_images(config, captions, cache, identity)
    held_out = hold_out([image.sha256 for image in images], config.data.validation_share)
    _warn(config, images)

    texts, texts_made = _encode_texts(config, cache, images)
    # A held-out image is never trained on, so its mirror image isn't either, and it is measured once, as it is.
    jobs = [
        (image, flipped)
        for image in images
        for flipped in (False, True)
        if not flipped or (config.data.flip and image.sha256 not in held_out)
    ]
    keys = {job: _cache_key(identity, config, *job) for job in jobs}
    wanted = {key: job for job, key in keys.items()}
    new = {key: job for key, job in wanted.items() if not cache.has(key)}
    _encode_images(config, cache, root, new)

    examples = [
        Example(
            key=example_key(image, flipped, config.model.resolution),
            file=image.file,
            caption=image.caption,
            bucket=image.bucket,
            crop=image.crop,
            flipped=flipped,
            latents=str(cache.path(keys[image, flipped])),
            text=str(cache.path(texts[image.caption])),
            held_out=image.sha256 in held_out,
        )
        for image, flipped in jobs
    ]
    index = Path(config.run_dir) / "dataset.jsonl"
    write_atomically(index, "".join(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples))
    made = len(new) + texts_made
    return Dataset(
        index=str(index),
        train=sum(not example.held_out for example in examples),
        validation=sum(example.held_out for example in examples),
        buckets=dict(sorted(Counter(f"{e.bucket[0]}x{e.bucket[1]}" for e in examples).items())),
        empty_text=str(cache.path(texts[""])),
        upscaled=sum(image.upscaled for image in images),
        encoded=made,
        cached=len(wanted) + len(texts) - made,
    )


def example_key(image: SourceImage, flipped: bool, resolution: int) -> str:
    """What an example shows, as a hash: the seed of its noise, the same under every encoder."""
    return key_of(image.sha256, GEOMETRY, resolution, *image.bucket, *image.crop, flipped)


def hold_out(hashes: Sequence[str], share: float) -> set[str]:
    """Content hashes of the images that are validated on: about `share` of them, by the order of their hashes.

    Adding images moves few others across, and equal images are on one side. None of fewer than 20 images; at
    least two different images stay for training.
    """
    copies = Counter(hashes)
    room = round(share * len(hashes)) if len(hashes) >= SMALLEST_SPLIT else 0
    chosen: set[str] = set()
    # Hashed once more: an image's own hash may be sorted by elsewhere, and this order must not be that one.
    for content in sorted(copies, key=lambda content: hashlib.sha256(f"held out/{content}".encode()).hexdigest()):
        if copies[content] <= room and len(copies) - len(chosen) > 2:
            chosen.add(content)
            room -= copies[content]
    return chosen


def _read_images(config: Config, captions: CaptionSet, cache: Cache, identity: str) -> list[SourceImage]:
    root, data, model = Path(captions.folder), config.data, config.model
    shapes = buckets.make(model.resolution, step=model.bucket_step, max_aspect=data.max_aspect)
    items = sorted(captions.items, key=lambda item: item.file)
    hashes = folder.content_hashes(root, [item.file for item in items])
    found, bad = [], []
    for item in items:
        try:
            size = decode.measure(root / item.file, data.max_pixels)
        except DataError as error:
            bad.append(str(error))
            continue
        bucket = buckets.nearest(size.width, size.height, shapes)
        crop = buckets.centre_crop(size.width, size.height, bucket)
        small = buckets.upscales(size.width, size.height, bucket)
        found.append(SourceImage(item.file, hashes[item.file], item.text, bucket, crop, small))
    # Damage behind the headers shows only when decoding: all of it is looked for before anything is encoded.
    new = [image.file for image in found if not cache.path(_cache_key(identity, config, image, False)).exists()]
    broken = decode.unreadable(root, new, data.max_pixels)
    bad += broken.values()
    decode.report_bad(bad, skip=data.skip_bad)
    found = [image for image in found if image.file not in broken]
    if not found:
        raise DataError(f"{root} has no readable image with a caption; try data.folder=path/to/images")
    return found


def _warn(config: Config, images: Sequence[SourceImage]) -> None:
    if len(images) == 1:
        say("warning: only one image; the adapter will draw it over and over; 10 to 40 of one style work well")
    trigger = config.caption.trigger.strip()
    without = [image.file for image in images if trigger.casefold() not in image.caption.casefold()]
    if trigger and without:
        say(
            f"warning: {len(without)} of {len(images)} captions lack the trigger phrase {trigger!r}, "
            f"first {without[0]}; their style is learnt without it; put it behind them in {folder.METADATA}"
        )
    small = [image.file for image in images if image.upscaled]
    if small:
        say(
            f"warning: {len(small)} of {len(images)} images are smaller than their bucket and are enlarged, "
            f"first {small[0]}; try larger images or a smaller model.resolution"
        )


def _encode_texts(config: Config, cache: Cache, images: Sequence[SourceImage]) -> tuple[dict[str, str], int]:
    """Cache key of each different caption (and of the empty one), and how many had to be encoded."""
    identity = text_encoder_hash(config.model)
    keys = {text: key_of("text", identity, text) for text in ["", *(image.caption for image in images)]}
    missing = [text for text, key in keys.items() if not cache.has(key)]
    if missing:
        encoder = load_text_encoder(config.model, pick_device(config.hardware.device))
        with progress("captions", len(missing), unit="captions") as bar:
            for start in range(0, len(missing), TEXT_BATCH):
                batch = missing[start : start + TEXT_BATCH]
                for text, tensors in zip(batch, encoder.encode(batch), strict=True):
                    cache.put(keys[text], tensors, lost=encoder.truncated_tail(text))
                bar.advance(len(batch))
        del encoder
        release_memory()
    for image in images:
        # Kept with the entry, so that the warning comes back when nothing is left to encode.
        if lost := cache.notes(keys[image.caption]).get("lost"):
            words = len(lost.split())
            say(f"warning: the caption of {image.file} is too long, the text encoder loses {words} words: {lost}")
    return keys, len(missing)


def _encode_images(config: Config, cache: Cache, root: Path, missing: dict[str, tuple[SourceImage, bool]]) -> None:
    """Encode and store the missing (image, mirrored?) jobs, one bucket at a time."""
    if not missing:
        return
    vae = load_vae(config.model, pick_device(config.hardware.device))

    def load_pixels(job: tuple[SourceImage, bool]) -> Tensor:
        source, flipped = job
        whole = decode.open_rgb(root / source.file, config.data.max_pixels)
        image, _ = decode.resize_and_crop(whole, source.bucket)
        return pixels(ImageOps.mirror(image) if flipped else image)

    with progress("images", len(missing), unit="images") as bar:
        for keys, pixels_B3HW in _decoded(missing, load_pixels):
            for key, tensors in zip(keys, vae.encode(pixels_B3HW), strict=True):
                cache.put(key, tensors)
            bar.advance(len(keys))
    del vae
    release_memory()


def _decoded(
    jobs: dict[str, tuple[SourceImage, bool]], decode: Callable[[tuple[SourceImage, bool]], Tensor]
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of one bucket each: keys and pixels (B, 3, H, W). The next batch is decoded while one is used."""
    by_bucket: dict[buckets.Bucket, list[str]] = {}
    for key, (image, _) in jobs.items():
        by_bucket.setdefault(image.bucket, []).append(key)
    batches = []
    for (width, height), keys in sorted(by_bucket.items()):
        size = max(1, PIXELS_PER_BATCH // (width * height))
        batches += [keys[start : start + size] for start in range(0, len(keys), size)]
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        ahead = [pool.submit(decode, jobs[key]) for key in batches[0]]
        for number, keys in enumerate(batches):
            pending, following = ahead, batches[number + 1] if number + 1 < len(batches) else []
            ahead = [pool.submit(decode, jobs[key]) for key in following]
            yield keys, torch.stack([future.result() for future in pending])


def pixels(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) fp32 in -1 … 1."""
    values_HW3 = torch.from_numpy(np.array(image, dtype=np.float32))
    return values_HW3.permute(2, 0, 1).contiguous() / 127.5 - 1


def _cache_key(identity: str, config: Config, image: SourceImage, flipped: bool) -> str:
    return key_of("image", identity, example_key(image, flipped, config.model.resolution))
