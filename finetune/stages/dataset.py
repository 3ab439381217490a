"""Captioned pictures (or conversations) -> encoded examples in the cache."""

import time
from pathlib import Path

from finetune.config import Config, as_dict
from finetune.data import cache, folder
from finetune.models import hub
from finetune.progress import say
from finetune.records import CaptionSet, Dataset, hash_of, load_record, save_receipt
from finetune.tasks import registry

STAGE = "dataset"


def dataset(config: Config, captions: CaptionSet) -> Dataset:
    """Every example encoded, and their index in the run folder; what the cache has is not encoded again.

    Raises DataError for unreadable pictures, ModelError if an encoder can't be loaded.
    """
    start = time.monotonic()
    run_dir = Path(config.run_dir)
    input_hash = _input_hash(config, captions)
    fresh = load_record(run_dir, STAGE, Dataset, input_hash=input_hash)
    if fresh and _complete(fresh):
        say(f"{STAGE}: fresh")
        return fresh
    record = registry.build_dataset(config, captions)
    seconds = time.monotonic() - start
    pictures = len(captions.items)
    save_receipt(
        run_dir,
        STAGE,
        record,
        input_hash=input_hash,
        seconds=seconds,
        figures={
            "pictures": pictures,
            "train": record.train,
            "validation": record.validation,
            "buckets": ", ".join(f"{name}: {count}" for name, count in record.buckets.items()),
            "upscaled": record.upscaled,
            "encoded": record.encoded,
            "cached": record.cached,
            "pictures_per_s": round(pictures / seconds, 3),
        },
    )
    return record


def _input_hash(config: Config, captions: CaptionSet) -> str:
    files = [item.file for item in captions.items]
    contents = folder.content_hashes(Path(captions.folder), files)
    texts = {item.file: item.text for item in captions.items}
    model = config.model
    return hash_of(
        contents,
        texts,
        as_dict(config.data),
        [model.kind, hub.identity(model.base), model.resolution, model.bucket_step, config.caption.trigger],
    )


def _complete(record: Dataset) -> bool:
    """Whether the index and every entry that it names are still there: the cache may be deleted at any time."""
    if not Path(record.index).is_file():
        return False
    wanted = {Path(record.empty_text)}
    lines = 0
    for example in record.examples():
        lines += 1
        wanted |= {Path(example.latents), Path(example.text)}
    return lines == record.train + record.validation and not cache.missing(wanted)
