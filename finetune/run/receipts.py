"""Why and how each stage of a run ran: `receipts/STAGE.json`, which also holds the record that the stage left.

A receipt has the hash of everything that the stage depended on, versions, seconds and figures. A stage whose receipt
carries the hash of today's inputs is up to date and is skipped.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from finetune.errors import RunError
from finetune.run import ranks
from finetune.run.atomic import write_atomically
from finetune.run.progress import taken_warnings
from finetune.run.records import from_plain

R = TypeVar("R")

Figures = dict[str, float | int | str | None]


@dataclass(frozen=True)
class Receipt:
    """Why and how a stage ran: `figures` are what it measured, `warnings` what it warned of."""

    stage: str
    input_hash: str
    seconds: float
    figures: Figures
    versions: dict[str, str]
    record: dict[str, Any]
    warnings: tuple[str, ...] = ()


def save_receipt(run_dir: Path, stage: str, record: Any, *, input_hash: str, seconds: float, figures: Figures) -> None:
    """Write `receipts/STAGE.json` atomically."""
    _write(run_dir, Receipt(stage, input_hash, seconds, figures, versions(), asdict(record), taken_warnings()))


def load_receipt(run_dir: Path, stage: str) -> Receipt | None:
    """The stage's receipt, or None if there is none. Raises RunError for a damaged one."""
    path = receipt_path(run_dir, stage)
    if not path.exists():
        return None
    try:
        return from_plain(Receipt, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it and the stage `{stage}` runs again") from error


def load_record(
    run_dir: Path,
    stage: str,
    record_type: type[R],
    *,
    input_hash: str | None = None,
    earlier: str = "",
    noted: Mapping[str, str] | None = None,
) -> R | None:
    """The record that the stage left, or None if it never ran or (when `input_hash` is given) ran on other inputs.

    earlier: what an earlier version, which knew less of its inputs, called the same ones: such a receipt counts, and
    from now on has `input_hash` and the figures `noted`.
    """
    receipt = load_receipt(run_dir, stage)
    if receipt is None or (input_hash is not None and receipt.input_hash not in (input_hash, earlier)):
        return None
    if input_hash is not None and receipt.input_hash != input_hash and ranks.rank() == 0:
        _write(run_dir, replace(receipt, input_hash=input_hash, figures=receipt.figures | dict(noted or {})))
    return from_plain(record_type, receipt.record)


def _write(run_dir: Path, receipt: Receipt) -> None:
    text = json.dumps(asdict(receipt), indent=2, ensure_ascii=False)
    write_atomically(receipt_path(run_dir, receipt.stage), text + "\n")


def receipt_path(run_dir: Path, stage: str) -> Path:
    """Where a stage's receipt lies."""
    return run_dir / "receipts" / f"{stage}.json"


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {}
    for package in ("finetune", "torch", "diffusers", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
