"""Records for tests, and which kinds there are."""

import typing
from pathlib import Path

from finetune import api
from finetune.run.records import Run, TextSet
from finetune.stages import COMMANDS


def returned_records() -> set[type]:
    """Every class that a command returns in Python, of the commands that say so; `serve` is a block."""
    commands = (COMMANDS.keys() & vars(api)) - {"serve"}
    return {kind for name in commands for kind in _classes(typing.get_type_hints(getattr(api, name))["return"])}


def parts(record: type) -> set[type]:
    """Every class of a record's fields."""
    return {kind for hint in typing.get_type_hints(record).values() for kind in _classes(hint)}


def _classes(hint: typing.Any) -> set[type]:
    return set(typing.get_args(hint) or [hint]) - {type(None)}


def run_record(folder: Path, **values: object) -> Run:
    """A run of four steps on images."""
    facts = {
        "folder": str(folder),
        "checkpoint": str(folder / "checkpoints/step-000004"),
        "steps": 4,
        "trainable": 25,
        "total": 1000,
        "first_loss": 0.5,
        "last_loss": 0.25,
        "first_validation": 0.4,
        "best_validation": 0.3,
        "best_step": 4,
        "unit": "images",
        "items": 16,
        "seconds": 8.0,
        "peak_gib": 1.5,
        "skipped_steps": 0,
        "training_hash": "h",
    }
    return Run(**(facts | values))  # type: ignore[arg-type]


def text_set(**values: object) -> TextSet:
    """200 conversations."""
    facts = {
        "rows": "cache/rows-1",
        "content": "c",
        "source": "chat.jsonl: messages (recognised)",
        "train": 180,
        "validation": 20,
        "tokens": 20_000,
        "trained": 5000,
        "truncated_share": 0.0,
        "packs": 88,
        "fill_share": 0.97,
        "trained_share": 0.25,
        "preview": "user: hi\nassistant: ⟦ahoy</s>⟧",
        "bad": 0,
        "cached": False,
    }
    return TextSet(**(facts | values))  # type: ignore[arg-type]
