"""Captioned images -> encoded examples of a latent diffusion model, one frozen encoder in memory at a time.

B images, 3 colours, H×W pixels of the bucket.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.config.describe import as_dict
from finetune.config.schema import Config, DataConfig, ModelConfig
from finetune.data.cache import Cache, whole
from finetune.data.images import authors, buckets, decode, folder, split
from finetune.data.images.ahead import ahead
from finetune.data.images.index import ImageIndex, content_hash
from finetune.data.images.metadata import METADATA
from finetune.diffusion.pipeline import (
    TextEncoder,
    Vae,
    base_hash,
    text_encoder_hash,
    vae_hash,
)
from finetune.errors import DataError
from finetune.memory.device import pick_device, release_memory
from finetune.run.atomic import write_atomically
from finetune.run.hashing import hash_of
from finetune.run.progress import plural, progress, say, shortened
from finetune.run.records import Caption, CaptionSet, Dataset, Example

GEOMETRY = "lanczos-1"  # part of every image's key: change it when the same bucket and crop would give other pixels
MADE_BY = 5  # part of every entry's key: raised when the same image or caption would give another entry
REPEATS = re.compile(r"/([0-9]{1,3})_[^0-9/][^/]*(?=/)")  # kohya's names of folders: 10_my style
SMALLEST_SPLIT = 20  # images; of fewer, holding some out costs more than the validation loss tells
MUCH = 0.5  # of an image's area: more than that is not cut away in silence


@dataclass(frozen=True)
class SourceImage:
    """One image before encoding: its content hash, caption, and how it is cut.

    crop: in upright original pixels. cut_away: share of the image's area outside it. guessed: its colours are.
    animated: only its first frame is looked at.
    """

    file: str
    sha256: str
    caption: str
    bucket: buckets.Bucket
    crop: tuple[int, int, int, int]
    upscaled: bool
    cut_away: float
    guessed: bool = False
    animated: bool = False


Variant = tuple[SourceImage, bool]  # an image, and whether it is mirrored


def inputs(config: Config, captions: CaptionSet | None) -> list[Any]:
    """Images and captions by content, the encoders, and everything that decides how images are cut."""
    assert captions is not None
    model, files = config.model, [item.file for item in captions.items]
    marked = split.for_validation(Path(captions.folder), files, config.data.validation_share)
    return [
        image_index(captions, config.data).hashes(files),
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
        *([sorted(marked)] if marked else []),
    ]


def build(config: Config, captions: CaptionSet | None) -> Dataset:
    """Encode what the cache lacks; see `encode_images`."""
    assert captions is not None
    return encode_images(
        captions,
        model=config.model,
        data=config.data,
        trigger=config.caption.trigger,
        device=pick_device(config.hardware.device),
        index_file=Path(config.run_dir) / "dataset.jsonl",
    )


def complete(record: Dataset) -> bool:
    """Whether the record's index and every entry that it names are still there, as they were when it was written."""
    index = Path(record.index)
    if not index.is_file():
        return False
    wanted = {record.empty_text}
    lines = 0
    for example in record.examples():
        lines += 1
        wanted |= {example.latents, example.text}
    return lines == record.train + record.validation and whole(wanted, since_ns=index.stat().st_mtime_ns)


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


def encode_images(
    captions: CaptionSet, *, model: ModelConfig, data: DataConfig, trigger: str, device: torch.device, index_file: Path
) -> Dataset:
    """Encode what the cache lacks, write `index_file` (one line an example, sorted by file).

    Raises DataError naming every unreadable image (left out with a warning under `data.skip_bad`).
    """
    images = read_images(captions, model, data)
    _warn_about(images, trigger, Path(captions.folder), Path(data.cache))
    held_out = held_out_images(images, Path(captions.folder), data.validation_share)
    # A held-out image is never trained on, so its mirror image isn't either, and it is measured once, as it is.
    variants = [
        (image, flipped)
        for image in images
        for flipped in (False, True)
        if not flipped or (data.flip and image.sha256 not in held_out)
    ]
    cache = Cache(Path(data.cache))
    cache.remove_abandoned()
    texts, new_texts = _encode_texts(cache, images, model, device)
    identity = vae_hash(model)
    latents = [cache_key(identity, *variant, model.resolution) for variant in variants]
    wanted = dict(zip(latents, variants, strict=True))
    new = {key: variant for key, variant in wanted.items() if not cache.has(key)}
    _encode_variants(cache, new, model, device, root=Path(captions.folder), max_pixels=data.max_pixels)
    index = io.BytesIO()  # and not all examples at once, each of a kilobyte
    for (image, flipped), key in zip(variants, latents, strict=True):
        example = Example(
            key=example_key(image, flipped, model.resolution),
            file=image.file,
            caption=image.caption,
            bucket=image.bucket,
            crop=image.crop,
            flipped=flipped,
            latents=str(cache.path(key)),
            text=str(cache.path(texts[image.caption])),
            held_out=image.sha256 in held_out,
        )
        index.write(json.dumps(asdict(example), ensure_ascii=False).encode() + b"\n")
    write_atomically(index_file, index.getvalue())
    validation = sum(image.sha256 in held_out for image, _ in variants)
    return Dataset(
        index=str(index_file),
        train=len(variants) - validation,
        validation=validation,
        buckets=dict(sorted(Counter(f"{image.bucket[0]}x{image.bucket[1]}" for image, _ in variants).items())),
        empty_text=str(cache.path(texts[""])),
        upscaled=sum(image.upscaled for image in images),
        encoded=len(new) + new_texts,
        cached=len(wanted) - len(new) + len(texts) - new_texts,
    )


def read_images(captions: CaptionSet, model: ModelConfig, data: DataConfig) -> list[SourceImage]:
    """Every captioned image that decodes, sorted by file, with its bucket. Raises DataError as `encode_images` does."""
    index = image_index(captions, data)
    items = sorted(captions.items, key=lambda item: item.file)
    hashes = index.hashes([item.file for item in items])
    # Damage shows only when decoding: all of it is looked for before anything is encoded.
    broken = index.unreadable(list(hashes))
    decode.report_bad(list(broken.values()), skip=data.skip_bad)
    shapes = buckets.make(model.resolution, step=model.bucket_step, max_aspect=data.max_aspect)
    images = [_source_image(item, hashes[item.file], index, shapes) for item in items if item.file not in broken]
    if not images:
        raise DataError(f"{captions.folder} has no readable image with a caption; try data.folder=path/to/images")
    return images


def image_index(captions: CaptionSet, data: DataConfig) -> ImageIndex:
    """What is known of the captioned images without reading them."""
    return ImageIndex(Path(captions.folder), cache=Path(data.cache), max_pixels=data.max_pixels)


def _source_image(item: Caption, sha256: str, index: ImageIndex, shapes: Sequence[buckets.Bucket]) -> SourceImage:
    size, notes = index.size(item.file), (index.is_guessed(item.file), index.is_animated(item.file))
    bucket = buckets.nearest(*size, shapes)
    crop = buckets.centre_crop(*size, bucket)
    cut_away = 1 - crop[2] * crop[3] / (size[0] * size[1])
    return SourceImage(item.file, sha256, item.text, bucket, crop, buckets.upscales(*size, bucket), cut_away, *notes)


def _warn_about(images: Sequence[SourceImage], trigger: str, root: Path, cache: Path) -> None:
    if len(images) == 1:
        say("warning: only one image; the adapter will draw it over and over; 10 to 40 of one style work well")
    first: dict[str, str] = {}
    copies = [image for image in images if first.setdefault(image.sha256, image.file) != image.file]
    if copies:
        say(
            f"warning: more than once: {plural(len(copies), 'image')}, {copies[0].file} is {first[copies[0].sha256]}; "
            "each copy is trained as an image of its own, delete what you do not want to stress"
        )
    repeats = {number for image in images for number in REPEATS.findall(f"/{image.file}")}
    if len(repeats) > 1:
        say(
            f"warning: folders are named with repeats of {' and '.join(sorted(repeats, key=int))}, as of kohya's "
            "scripts, which are not read: each image is trained as often as another; copy files to stress them"
        )
    trigger = trigger.strip()
    without = [image.file for image in images if trigger.casefold() not in image.caption.casefold()]
    if trigger and without:
        say(
            f"warning: no trigger phrase {trigger!r} in {len(without)} of {plural(len(images), 'caption')}, first "
            f"{without[0]}; their style is learnt without it; add it to them in {_places(root, without, cache)}"
        )
    small = [image.file for image in images if image.upscaled]
    if small:
        say(
            f"warning: smaller than the bucket and enlarged: {len(small)} of {plural(len(images), 'image')}, first "
            f"{small[0]}; try larger images or a smaller model.resolution"
        )
    guessed = [image.file for image in images if image.guessed]
    if guessed:
        say(
            f"warning: CMYK without a colour profile: {len(guessed)} of {plural(len(images), 'image')}, first "
            f"{guessed[0]}; programs differ in their colours, and they are trained as browsers show them; save them as "
            "sRGB images to choose"
        )
    animated = [image.file for image in images if image.animated]
    if animated:
        say(
            f"warning: only the first frame is trained: {len(animated)} of {plural(len(images), 'image')}, first "
            f"{animated[0]}; save the frames that you want as images of their own"
        )
    cut = sorted((image for image in images if image.cut_away > MUCH), key=lambda image: -image.cut_away)
    if cut:
        say(
            f"warning: more than half is cut away: {len(cut)} of {plural(len(images), 'image')}, most of {cut[0].file} "
            f"({cut[0].cut_away:.0%}); crop them to what you want to train, or try a larger data.max_aspect"
        )


def _places(root: Path, files: Sequence[str], cache: Path) -> str:
    """The file that holds the first image's caption, and how many others hold the rest."""
    generated = authors.remembered(cache) | folder.generated_captions(root)
    sources = folder.captions(root, files, generated).sources
    first, *others = dict.fromkeys(sources.get(file, METADATA) for file in files)
    return f"{first} and {plural(len(others), 'other file')}" if others else first


def held_out_count(images: int, share: float) -> int:
    """How many of so many images are held out at most."""
    return round(share * images) if images >= SMALLEST_SPLIT else 0


def held_out_images(images: Sequence[SourceImage], root: Path, share: float) -> set[str]:
    """Content hashes of the images that are validated on: those that the folder names, else a share of them."""
    if marked := split.for_validation(root, [image.file for image in images], share):
        return {image.sha256 for image in images if image.file in marked}
    return hold_out([image.sha256 for image in images], share)


def hold_out(hashes: Sequence[str], share: float) -> set[str]:
    """Content hashes of the images that are validated on: about `share` of them, by the order of their hashes.

    Adding images moves few others across, and equal images are on one side. None of fewer than 20 images; at
    least two different images stay for training.
    """
    copies = Counter(hashes)
    room = held_out_count(len(hashes), share)
    chosen: set[str] = set()
    # Hashed once more: an image's own hash may be sorted by elsewhere, and this order must not be that one.
    for content in sorted(copies, key=lambda content: hashlib.sha256(f"held out/{content}".encode()).hexdigest()):
        if copies[content] <= room and len(copies) - len(chosen) > 2:
            chosen.add(content)
            room -= copies[content]
    return chosen


def _encode_texts(
    cache: Cache, images: Sequence[SourceImage], model: ModelConfig, device: torch.device
) -> tuple[dict[str, str], int]:
    """Cache key of each different caption (and of the empty one), and how many had to be encoded.

    One at a time: in a batch the last bits of an entry would depend on which others were missing.
    """
    identity = text_encoder_hash(model)
    keys = {text: hash_of("text", MADE_BY, identity, text) for text in ["", *(image.caption for image in images)]}
    new = [text for text, key in keys.items() if not cache.has(key)]
    if new:
        encoder = TextEncoder(model, device)
        with progress("captions", len(new), unit="captions") as bar:
            for text in new:
                cache.put(keys[text], encoder.encode([text])[0], truncated=encoder.truncated_tail(text))
                bar.advance(1)
        del encoder
        release_memory()
    for image in images:
        # Kept with the entry, so that the warning comes back when nothing is left to encode.
        if tail := cache.notes(keys[image.caption]).get("truncated"):
            words = plural(len(tail.split()), "word")
            say(f"warning: the caption of {image.file} is truncated: {words} dropped: {shortened(tail)}")
    return keys, len(new)


def cache_key(identity: str, image: SourceImage, flipped: bool, resolution: int) -> str:
    """Where an example's latents lie in the cache, under the autoencoder of that identity."""
    return hash_of("latents", MADE_BY, identity, example_key(image, flipped, resolution))


def example_key(image: SourceImage, flipped: bool, resolution: int) -> str:
    """What an example shows, as a hash: the seed of its noise, the same under every encoder."""
    return hash_of(image.sha256, GEOMETRY, resolution, *image.bucket, *image.crop, flipped)


def _encode_variants(
    cache: Cache, new: Mapping[str, Variant], model: ModelConfig, device: torch.device, *, root: Path, max_pixels: int
) -> None:
    """Encode and store latents under their keys. One at a time, as captions are."""
    if not new:
        return
    vae = Vae(model, device)
    loaded = ahead([image for image, _ in new.values()], lambda image: load(image, root, max_pixels))
    with progress("images", len(new), unit="images") as bar:
        for (key, (_, flipped)), pixels_3HW in zip(new.items(), loaded, strict=True):
            cache.put(key, vae.encode((pixels_3HW.flip(-1) if flipped else pixels_3HW)[None])[0])
            bar.advance(1)
    del vae
    release_memory()


def load(image: SourceImage, root: Path, max_pixels: int) -> Tensor:
    """The pixels of an image, cut to its bucket. Raises DataError for one that is another since it was hashed."""
    path = root / image.file
    with decode.file_bytes(path) as data:
        if content_hash(data) != image.sha256:
            raise DataError(f"{path}: was changed while it was prepared; run the same command again")
        return pixels(decode.resize_and_crop(decode.rgb(path, data, max_pixels), image.bucket)[0])


def pixels(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) fp32 in -1 … 1."""
    values_HW3 = torch.from_numpy(np.array(image, dtype=np.float32))
    return values_HW3.permute(2, 0, 1).contiguous() / 127.5 - 1
