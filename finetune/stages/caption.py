"""Captions for the images that have none, into the folder's `metadata.jsonl`."""

import itertools
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from finetune.config.describe import as_dict
from finetune.config.model_kinds import model_kind
from finetune.config.schema import CaptionConfig, Config, DataConfig
from finetune.data.images import authors, decode, folder, usable
from finetune.data.images.ahead import READ_AHEAD, ahead
from finetune.data.images.index import ImageIndex
from finetune.data.images.metadata import METADATA
from finetune.diffusion.captioner import Captioner, load_captioner
from finetune.errors import ConfigError
from finetune.memory.device import pick_device, pick_dtype, release_memory
from finetune.run.hashing import hash_of
from finetune.run.outputs import free_name
from finetune.run.progress import plural, progress, say
from finetune.run.receipts import load_record, save_receipt
from finetune.run.records import Caption, CaptionSet

STAGE = "caption"
NOTICED_S, APART = 0.1, 20.0  # writing captions that takes longer waits for so many times as long before the next


def caption(config: Config) -> CaptionSet:
    """Every image of `data.folder` with its caption; images without one are captioned, batch by batch.

    A caption that is there is kept unless `caption.overwrite`. Interrupted, it goes on with the next image. Raises
    DataError for a folder without images, one that can't be written, texts that belong to no image while captions are
    missing, and unreadable images (all of them named at once; left out with a warning under `data.skip_bad`),
    ModelError if the captioner can't be loaded, ConfigError for a kind of model whose examples have no captions.
    """
    if not model_kind(config.model.kind).captioned:
        raise ConfigError(f"this recipe trains a {config.model.kind} model; only images have captions")
    start = time.monotonic()
    root, run_dir, data = Path(config.data.folder), Path(config.run_dir), config.data
    found = folder.images(root)
    index = ImageIndex(root, cache=Path(data.cache), max_pixels=data.max_pixels)
    no_files = folder.no_files(root)
    generated = usable.generated(root, Path(data.cache), load_record(run_dir, STAGE, CaptionSet))
    hashes = index.hashes(found)
    captions = folder.captions(root, found, () if config.caption.overwrite else generated)
    input_hash = _input_hash(hashes | no_files, captions.texts, config.caption, data)
    if record := load_record(run_dir, STAGE, CaptionSet, input_hash=input_hash):
        _warn_about_unused(captions)
        say(f"{STAGE}: up to date, skipped")
        return record
    broken = index.unreadable(found) | no_files
    _warn_about_left_out(root)
    files = usable.readable(root, found, broken, skip=data.skip_bad)
    todo = usable.to_caption(root, files, captions, generated, overwrite=config.caption.overwrite)
    if unread := captions.unread:
        beside = f"{plural(len(unread), 'file')} beside images without a caption, first {unread[0]}"
        say(f"warning: not read: {beside}; captions beside images are read from {' '.join(folder.SIDECARS)}")
    if todo:
        _keep_written(root, captions, {file for file in todo if file in captions.texts}, generated)
        device = pick_device(config.hardware.device)
        dtype = pick_dtype(config.trainer.precision, device)
        generated |= _generate(root, todo, config.caption, device, dtype, data)
        captions = folder.captions(root, found, () if config.caption.overwrite else generated)
    _warn_about_unused(captions)
    record = CaptionSet(str(root), _items(files, captions.texts, generated), tuple(broken))
    seconds = time.monotonic() - start
    save_receipt(
        run_dir,
        STAGE,
        record,
        input_hash=_input_hash(hashes | no_files, captions.texts, config.caption, data),
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


def _warn_about_unused(captions: folder.Captions) -> None:
    if unused := captions.unused:
        file = min(unused)
        say(
            f"warning: {plural(len(unused), 'image')} with two captions, first {file}: the one in "
            f"{captions.sources[file]} is used, the one in {unused[file]} is not; delete one of them"
        )


def _warn_about_left_out(root: Path) -> None:
    if other := folder.unsupported_files(root):
        unread = f"{plural(len(other), 'image')} in formats that can't be read, first {other[0]}"
        say(f"warning: left out {unread}; save such images as JPEG or PNG, or rename what is one already")
    if linked := folder.linked_folders(root):
        say(
            f"warning: left out {plural(len(linked), 'linked folder')}, first {linked[0]}; links to folders are not "
            "followed, copy the folder or link its files"
        )
    if runs := folder.run_folders(root):
        drawn = f"the images that {plural(len(runs), 'run')} drew, first in {runs[0]}"
        say(f"warning: left out {drawn}; keep runs outside of the folder: run_dir=PATH")


def _keep_written(root: Path, captions: folder.Captions, replaced: Collection[str], generated: Collection[str]) -> None:
    """Copy the metadata files in which `caption.overwrite` replaces captions by a person; text files stay anyway."""
    written = [file for file in replaced if authors.key(file, captions.texts[file]) not in generated]
    for source in sorted({captions.sources[file] for file in written}):
        metadata = root / source
        if metadata.name == METADATA:
            copied = free_name(metadata.with_name(f"before-overwrite-{METADATA}"))
            shutil.copy2(metadata, copied)
            say(f"caption.overwrite replaces captions by you; {metadata} as it was is now {copied}")


def _generate(
    root: Path, todo: Sequence[str], settings: CaptionConfig, device: torch.device, dtype: torch.dtype, data: DataConfig
) -> set[str]:
    """Caption images; the keys of the new captions."""
    captioner = load_captioner(settings, device, dtype)
    generated = _write_captions(captioner, root, todo, settings, data)
    del captioner
    release_memory()
    return generated


def _write_captions(
    captioner: Captioner, root: Path, todo: Sequence[str], settings: CaptionConfig, data: DataConfig
) -> set[str]:
    """Write each batch at once, so that a kill loses one batch; in a large folder, where each time all of the metadata
    is written, so seldom that it takes little of the time."""
    generated: set[str] = set()
    waiting: dict[str, str] = {}
    took_s, written = 0.0, time.monotonic()
    read = ahead(
        todo, lambda file: captioner.read(decode.open_rgb(root / file, data.max_pixels)), settings.batch + READ_AHEAD
    )
    try:
        with progress(STAGE, len(todo), unit="images") as bar:
            for first in range(0, len(todo), settings.batch):
                batch = todo[first : first + settings.batch]
                texts = captioner.caption(list(itertools.islice(read, len(batch))))
                worded = {file: wording(text, settings) for file, text in zip(batch, texts, strict=True)}
                authors.remember(Path(data.cache), worded)
                generated |= {authors.key(file, text) for file, text in worded.items()}
                waiting |= worded
                began = time.monotonic()
                if took_s < NOTICED_S or began - written >= APART * took_s:
                    folder.add_captions(root, waiting, overwrite=settings.overwrite)
                    waiting, written = {}, time.monotonic()
                    took_s = written - began
                bar.advance(len(batch), worded[batch[-1]])
    finally:
        if waiting:
            folder.add_captions(root, waiting, overwrite=settings.overwrite)
    return generated


def wording(text: str, settings: CaptionConfig) -> str:
    """The caption that is written: prefix, generated text, and behind a comma the trigger phrase unless it is there."""
    prefix, trigger = settings.prefix.strip(), settings.trigger.strip()
    worded = " ".join(filter(None, [prefix, text]))
    if trigger and trigger.casefold() not in worded.casefold():
        worded = f"{worded}, {trigger}" if worded else trigger
    return worded


def _items(files: Sequence[str], texts: Mapping[str, str], generated: set[str]) -> tuple[Caption, ...]:
    """A caption is the captioner's as long as nobody changed it.

    A captioner that found no words leaves an image without any.
    """
    found = [(file, texts.get(file, "")) for file in files]
    return tuple(
        Caption(file, text, "generated" if authors.key(file, text) in generated else "user") for file, text in found
    )
