"""Captions for the images that have none, from BLIP, into the folder's `metadata.jsonl`."""

import time
from collections.abc import Sequence
from pathlib import Path

from finetune.config.describe import as_dict
from finetune.config.schema import CaptionConfig, Config
from finetune.data.images import decode, folder
from finetune.diffusion.captioner import Captioner
from finetune.errors import DataError
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
    once; left out with a warning under `data.skip_bad`), ModelError if the captioner can't be loaded.
    """
    start = time.monotonic()
    root, run_dir = Path(config.data.folder), Path(config.run_dir)
    files = folder.images(root)
    hashes = folder.content_hashes(root, files)
    there = folder.captions(root, files)
    if other := folder.overridden_sidecars(root, there):
        say(
            f"warning: {len(other)} images have a .txt that {folder.METADATA} outvotes, first {other[0]}; "
            "to take the .txt delete the image's line there"
        )
    if fresh := load_record(run_dir, STAGE, CaptionSet, input_hash=_input_hash(config, hashes, there)):
        say(f"{STAGE}: fresh")
        return fresh
    if other := folder.unread(root):
        say(f"warning: {len(other)} images are in formats that can't be read and are left out, first {other[0]}")
    broken = decode.unreadable(root, files, config.data.max_pixels)
    decode.report_bad(list(broken.values()), skip=config.data.skip_bad)
    files = [file for file in files if file not in broken]
    if not files:
        raise DataError(f"{root} has no readable image left; try data.folder=path/to/images")
    todo = [file for file in files if config.caption.overwrite or file not in there]
    if todo:
        folder.check_writable(root, todo)
        _generate(config, root, todo)
        there = folder.captions(root, files)
    record = CaptionSet(str(root), _items(run_dir, files, there, set(todo)), tuple(broken))
    seconds = time.monotonic() - start
    save_receipt(
        run_dir,
        STAGE,
        record,
        input_hash=_input_hash(config, hashes, there),
        seconds=seconds,
        figures={
            "images": len(files),
            "generated": len(todo),
            "skipped": len(broken),
            "images_per_s": round(len(todo) / seconds, 3) if todo else 0.0,
        },
    )
    return record


def _generate(config: Config, root: Path, todo: Sequence[str]) -> None:
    """Caption images and write each batch at once, so that a kill loses one batch."""
    settings = config.caption
    device = pick_device(config.hardware.device)
    captioner = Captioner(settings.model, device, pick_dtype(config.trainer.precision, device))
    with progress(STAGE, len(todo), unit="images") as bar:
        for first in range(0, len(todo), settings.batch):
            batch = todo[first : first + settings.batch]
            opened = [decode.open_rgb(root / file, config.data.max_pixels) for file in batch]
            texts = captioner.caption(opened, settings.max_new_tokens, settings.num_beams)
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


def _items(run_dir: Path, files: Sequence[str], texts: dict[str, str], made: set[str]) -> tuple[Caption, ...]:
    """A caption counts as generated if this run or the one before wrote it and nobody changed it since."""
    before = load_record(run_dir, STAGE, CaptionSet)
    earlier = {(item.file, item.text) for item in before.items if item.source == "generated"} if before else set()
    return tuple(
        Caption(file, texts[file], "generated" if file in made or (file, texts[file]) in earlier else "user")
        for file in files
    )


def _input_hash(config: Config, hashes: dict[str, str], texts: dict[str, str]) -> str:
    data = [config.data.folder, config.data.skip_bad, config.data.max_pixels]
    return hash_of(hashes, texts, as_dict(config.caption), data)
