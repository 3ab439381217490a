"""Why and how each stage of a run ran: `receipts/STAGE.json`, which also holds the record that the stage left.

A receipt has the hash of everything that the stage depended on, versions, seconds, figures, and the hashes of the files
that the stage left in the run folder. A stage whose receipt carries the hash of today's inputs, and whose files are as
it left them, is up to date and is skipped. Paths are relative to the run folder.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from finetune.errors import RunError
from finetune.reading import read_text
from finetune.run import outputs as output_files
from finetune.run import ranks
from finetune.run.atomic import write_atomically
from finetune.run.outputs import Output, compare, outputs_of
from finetune.run.plain import UNREADABLE, first_line, from_plain, inside, placed, require_duration
from finetune.run.progress import say, taken_warnings

R = TypeVar("R")

MUCH_BYTES = 64 << 20  # takes a tenth of a second to hash; that a larger file was read again is worth a note
Figures = dict[str, float | int | str | None]


@dataclass(frozen=True)
class Receipt:
    """Why and how a stage ran: `figures` are what it measured, `outputs` its files by their path in the run folder,
    `editable` those that a person may change, `warnings` what it warned of."""

    stage: str
    input_hash: str
    seconds: float
    figures: Figures
    versions: dict[str, str]
    record: dict[str, Any]
    outputs: dict[str, Output] = field(default_factory=dict)
    editable: dict[str, Output] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_duration(self.seconds)


def save_receipt(
    run_dir: Path,
    stage: str,
    record: Any,
    *,
    input_hash: str,
    seconds: float,
    figures: Figures,
    outputs: Iterable[Path] = (),
    editable: Iterable[Path] = (),
) -> None:
    """Write `receipts/STAGE.json` atomically. outputs: files and folders in the run folder that the stage left;
    editable: files too, and the stage is up to date whatever becomes of them."""
    values = inside(type(record), asdict(record))
    found, free = outputs_of(run_dir, outputs), outputs_of(run_dir, editable)
    _write(run_dir, Receipt(stage, input_hash, seconds, figures, versions(), values, found, free, taken_warnings()))


def load_receipt(run_dir: Path, stage: str) -> Receipt | None:
    """The stage's receipt, or None if there is none. Raises RunError for a damaged one."""
    path = receipt_path(run_dir, stage)
    try:
        receipt = from_plain(Receipt, json.loads(read_text(path)))
        if receipt.stage != stage:
            raise ValueError(f"it is of the stage {receipt.stage!r}")
        return receipt
    except FileNotFoundError:
        return None
    except PermissionError:  # whole, and not to be deleted
        raise
    except UNREADABLE as error:
        raise _damaged(run_dir, stage, error) from error


def record_of(receipt: Receipt, record_type: type[R], run_dir: Path) -> R:
    """The record of a receipt in this run folder. Raises RunError if it is not one of that type."""
    try:
        return from_plain(record_type, placed(record_type, receipt.record, run_dir))
    except UNREADABLE as error:
        raise _damaged(run_dir, receipt.stage, error) from error


def load_record(
    run_dir: Path,
    stage: str,
    record_type: type[R],
    *,
    input_hash: str | None = None,
    earlier: str = "",
    noted: Mapping[str, str] | None = None,
    outputs: Callable[[R], Iterable[Path]] | None = None,
) -> R | None:
    """The record that the stage left, or None if it never ran or (when `input_hash` is given) is not up to date.

    earlier: what an earlier version, which knew less of its inputs, called the same ones: such a receipt counts, and
    from now on has `input_hash` and the figures `noted`. outputs: what the stage leaves; an earlier version didn't note
    it, and today's content counts as what it left.
    """
    receipt = load_receipt(run_dir, stage)
    if receipt is None:
        return None
    if input_hash is None:
        return record_of(receipt, record_type, run_dir)
    if receipt.input_hash not in filter(None, (input_hash, earlier)):
        return None
    record, found = record_of(receipt, record_type, run_dir), receipt.outputs
    if found:
        wrong, found = compare(run_dir, found)
    else:
        paths = list(outputs(record)) if outputs else []
        wrong = next((f"{path.relative_to(run_dir)} is gone" for path in paths if not path.exists()), "")
        found = {} if wrong else outputs_of(run_dir, paths)
    if wrong:
        say(f"{stage}: {wrong} since it was made; it is made again")
        return None
    read_again = sum(output.size for name, output in found.items() if output != receipt.outputs.get(name))
    known = replace(receipt, input_hash=input_hash)
    if receipt.input_hash != input_hash:
        known = replace(known, figures=receipt.figures | dict(noted or {}))
    if not receipt.outputs or read_again > MUCH_BYTES:  # else a command with nothing to do writes nothing
        known = replace(known, outputs=found)
    if known != receipt and ranks.rank() == 0:
        _write(run_dir, known)
    return record


def set_aside_changed(run_dir: Path, stage: str, folder: Path, replacement: Path) -> None:
    """Keep what a person changed in or added to the stage's folder, which `replacement` is to replace; see `outputs`.

    Raises RunError for a damaged receipt, OSError.
    """
    receipt = load_receipt(run_dir, stage)
    noted = receipt.outputs | receipt.editable if receipt else {}
    output_files.set_aside_changed(run_dir, folder, noted, replacement)


def _damaged(run_dir: Path, stage: str, error: Exception) -> RunError:
    path = receipt_path(run_dir, stage)
    return RunError(f"{path} is damaged ({first_line(error)}); delete it and the stage `{stage}` runs again")


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
