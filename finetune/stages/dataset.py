"""Captioned images or conversations -> encoded examples in the cache."""

import time
from pathlib import Path

from finetune import kinds
from finetune.config.schema import Config
from finetune.run.hashing import hash_of
from finetune.run.progress import say
from finetune.run.receipts import load_record, save_receipt
from finetune.run.records import CaptionSet, Dataset, TextSet

STAGE = "dataset"


def dataset(config: Config, captions: CaptionSet | None) -> Dataset | TextSet:
    """Every example encoded; what the cache has is not encoded again.

    Raises DataError for unreadable images or rows, ModelError if an encoder can't be loaded.
    """
    start = time.monotonic()
    run_dir = Path(config.run_dir)
    kind = kinds.of(config)
    input_hash = hash_of(*kind.dataset_inputs(config, captions))
    record: Dataset | TextSet | None
    record = load_record(run_dir, STAGE, kind.DATASET, input_hash=input_hash, outputs=_outputs)
    if record and kind.dataset_complete(record):
        say(f"{STAGE}: up to date, skipped")
        return record
    record = kind.build_dataset(config, captions)
    seconds = time.monotonic() - start
    figures = kind.dataset_figures(record) | {"examples_per_s": round((record.train + record.validation) / seconds, 3)}
    save_receipt(
        run_dir, STAGE, record, input_hash=input_hash, seconds=seconds, figures=figures, outputs=_outputs(record)
    )
    return record


def _outputs(record: Dataset | TextSet) -> list[Path]:
    """Images have an index in the run folder; rows of tokens lie in the cache, with checksums of their own."""
    return [Path(record.index)] if isinstance(record, Dataset) else []
