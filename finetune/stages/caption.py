"""Captions for the images that have none, into the folder's `metadata.jsonl`."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from finetune.config.describe import as_dict
from finetune.config.model_kinds import model_kind
from finetune.config.schema import CaptionConfig, Config, DataConfig
from finetune.data.images import decode, folder
from finetune.data.images.index import ImageIndex
from finetune.diffusion.captioner import load_captioner
from finetune.errors import ConfigError, DataError
from finetune.memory.device import pick_device, pick_dtype, release_memory
from finetune.run.hashing import hash_of
from finetune.run.progress import progress, say
from finetune.run.receipts import load_record, save_receipt
from finetune.run.records import Caption, CaptionSet

STAGE = "caption"


def caption(config: Config) -> CaptionSet:
    """Every image of `data.folder` with its caption; images without one are captioned, batch by batch.

    A caption that is there is kept unless `caption.overwrite`. Interrupted, it goes on with the next image. Raises
    DataError for a folder without images, one that can't be written, and unreadable images (all of them named at
    once; left out with a warning under `data.skip_bad`), ModelError if the captioner can't be loaded, ConfigError for a
    kind of model whose examples have no captions.
    """
    if not model_kind(config.model.kind).captioned:
        raise ConfigError(f"this recipe trains a {config.model.kind} model; only images have captions")
    start = time.monotonic()
    root, run_dir, data = Path(config.data.folder), Path(config.run_dir), config.data
    found = folder.images(root)
    index = ImageIndex(root, cache=Path(data.cache), max_pixels=data.max_pixels)
    hashes, texts = index.hashes(found), folder.captions(root, found)
    _warn_about_sidecars(root, texts)
    record = load_record(run_dir, STAGE, CaptionSet, input_hash=_input_hash(hashes, texts, config.caption, data))
    if record:
        say(f"{STAGE}: up to date, skipped")
        return record
    broken = index.unreadable(found)
    files = _readable(root, found, broken, skip=data.skip_bad)
    todo = [file for file in files if config.caption.overwrite or file not in texts]
    if todo:
        folder.check_writable(root, todo)
        device = pick_device(config.hardware.device)
        dtype = pick_dtype(config.trainer.precision, device)
        _generate(root, todo, config.caption, device, dtype, max_pixels=data.max_pixels)
        texts = folder.captions(root, found)
    record = CaptionSet(str(root), _items(run_dir, files, texts, set(todo)), tuple(broken))
    seconds = time.monotonic() - start
    save_receipt(
        run_dir,
        STAGE,
        record,
        input_hash=_input_hash(hashes, texts, config.caption, data),
        seconds=seconds,
        figures={
            "images": len(files),
            "generated": len(todo),
            "skipped": len(broken),
            "images_per_s": round(len(todo) / seconds, 3) if todo else 0.0,
        },
    )
    return record


def _input_hash(hashes: Mapping[str, str], texts: Mapping[str, str], caption: CaptionConfig, data: DataConfig) -> str:
    return hash_of(hashes, texts, as_dict(caption), [data.folder, data.skip_bad, data.max_pixels])


def _warn_about_sidecars(root: Path, texts: Mapping[str, str]) -> None:
    if other := folder.overridden_sidecars(root, texts):
        say(
            f"warning: {len(other)} images have a .txt that differs from their caption in {folder.METADATA}, which is "
            f"used, first {other[0]}; to use the .txt delete the image's line there"
        )


def _readable(root: Path, files: Sequence[str], broken: Mapping[str, str], *, skip: bool) -> list[str]:
    """The files that decode, the others reported. Raises DataError if none does, or unless bad ones are to `skip`."""
    if other := folder.unsupported_files(root):
        say(f"warning: {len(other)} images are in formats that can't be read and are left out, first {other[0]}")
    decode.report_bad(list(broken.values()), skip=skip)
    readable = [file for file in files if file not in broken]
    if not readable:
        raise DataError(f"{root} has no readable image left; try data.folder=path/to/images")
    return readable


def _generate(
    root: Path, todo: Sequence[str], settings: CaptionConfig, device: torch.device, dtype: torch.dtype, max_pixels: int
) -> None:
    """Caption images and write each batch at once, so that a kill loses one batch."""
    captioner = load_captioner(settings, device, dtype)
    with progress(STAGE, len(todo), unit="images") as bar:
        for first in range(0, len(todo), settings.batch):
            batch = todo[first : first + settings.batch]
            texts = captioner.caption([decode.open_rgb(root / file, max_pixels) for file in batch])
            worded = {file: wording(text, settings) for file, text in zip(batch, texts, strict=True)}
            folder.add_captions(root, worded, overwrite=settings.overwrite)
            bar.advance(len(batch), worded[batch[-1]])
    del captioner
    release_memory()


def wording(text: str, settings: CaptionConfig) -> str:
    """The caption that is written: prefix, generated text, and behind a comma the trigger phrase unless it is there."""
    prefix, trigger = settings.prefix.strip(), settings.trigger.strip()
    worded = " ".join(filter(None, [prefix, text]))
    if trigger and trigger.casefold() not in worded.casefold():
        worded = f"{worded}, {trigger}" if worded else trigger
    return worded


def _items(run_dir: Path, files: Sequence[str], texts: Mapping[str, str], made: set[str]) -> tuple[Caption, ...]:
    """A caption counts as generated if this run or the one before wrote it and nobody changed it since.

    A captioner that found no words leaves an image without any.
    """
    before = load_record(run_dir, STAGE, CaptionSet)
    earlier = {(item.file, item.text) for item in before.items if item.source == "generated"} if before else set()
    found = [(file, texts.get(file, "")) for file in files]
    return tuple(
        Caption(file, text, "generated" if file in made or (file, text) in earlier else "user") for file, text in found
    )
