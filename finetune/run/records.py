"""What stages hand to one another: frozen values, each of them also a JSON receipt in the run folder.

A receipt (`receipts/STAGE.json`) holds the hash of everything the stage depended on, versions, seconds, figures and the
record itself. A stage whose receipt carries the same hash is fresh and is not run again.
"""

import hashlib
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from finetune.errors import RunError
from finetune.run.atomic import write_atomically

R = TypeVar("R")

METRICS = "metrics.jsonl"  # the run's curves, one JSON line per logged step


@dataclass(frozen=True)
class Caption:
    """One image's caption. `source`: "user" (was there before) or "generated"."""

    file: str
    text: str
    source: str


@dataclass(frozen=True)
class CaptionSet:
    """Every image of a folder with its caption; `file` is relative to `folder`."""

    folder: str
    items: tuple[Caption, ...]
    skipped: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        from finetune.reporting.notebook import captions_html

        return captions_html(self)


@dataclass(frozen=True)
class Example:
    """One encoded example.

    key: content hash of image bytes and geometry; the seed of its noise.
    bucket: width, height in pixels. crop: left, top, width, height in the upright original, pixels.
    latents, text: files in the cache. held_out: in the validation part, never trained on.
    """

    key: str
    file: str
    caption: str
    bucket: tuple[int, int]
    crop: tuple[int, int, int, int]
    flipped: bool
    latents: str
    text: str
    held_out: bool


@dataclass(frozen=True)
class Dataset:
    """Encoded examples: `index` is a JSON-lines file, one `Example` a line, read again at each iteration.

    buckets: "WxH" -> examples. empty_text: the encoded empty caption. upscaled: images smaller than their bucket.
    encoded, cached: cache entries that were made and that were there already.
    """

    index: str
    train: int
    validation: int
    buckets: dict[str, int]
    empty_text: str
    upscaled: int = 0
    encoded: int = 0
    cached: int = 0
    content_name: ClassVar[str] = "images and captions"

    @property
    def content(self) -> str:
        """Hash of everything that is trained on, and of the split."""
        return hash_of([[example.key, example.caption, example.held_out] for example in self.examples()])[:16]

    def examples(self) -> Iterator[Example]:
        """Every example in the index's order (sorted by file name)."""
        with open(self.index, encoding="utf-8") as lines:
            for line in lines:
                yield from_plain(Example, json.loads(line))

    def _repr_html_(self) -> str:
        from finetune.reporting.notebook import dataset_html

        return dataset_html(self)


@dataclass(frozen=True)
class TextSet:
    """Conversations as token rows in the cache folder `rows`.

    train, validation: rows on either side. content: hash of everything that decides ids and masks, and of the split.
    tokens, trained: of all rows, after cutting; lost: share of trained tokens lost to the length. packs, real, learnt:
    packs of an epoch, and the shares of their slots that hold a token and a trained one. marked: one row as text, its
    trained tokens in ⟦ ⟧. cached: found, not made.
    """

    rows: str
    content: str
    source: str
    train: int
    validation: int
    tokens: int
    trained: int
    truncated_share: float
    packs: int
    fill_share: float
    trained_share: float
    preview: str
    bad: int
    cached: bool
    content_name: ClassVar[str] = "conversations and template"

    def _repr_html_(self) -> str:
        from finetune.reporting.notebook import text_set_html

        return text_set_html(self)


@dataclass(frozen=True)
class Run:
    """A finished training run. Seconds count training steps only; losses are means per image or trained token.

    first_loss: of the first step. last_loss: mean over the last 10 % of the steps.
    checkpoint: the last one's folder. unit, items: what was trained on, "images" or "tokens", and how many.
    micro_batch: examples in one forward pass at the end. effective: in one optimiser step, of all processes; 0 in
    records from before that was noted. eased: what gave way because memory ran out, empty if nothing.
    peak_gib: the most that this process held so far. planned_gib, probed_gib, measured_gib: the most in this training
    with its validation and previews, by the plan, after trying its worst step, and at the end; None without a GPU or
    with trainer.autotune=off. slow_steps: that took much longer than those before, several in a row.
    """

    folder: str
    checkpoint: str
    steps: int
    trainable: int
    total: int
    first_loss: float
    last_loss: float
    first_validation: float | None
    best_validation: float | None
    best_step: int | None
    unit: str
    items: int
    seconds: float
    peak_gib: float
    skipped_steps: int
    training_hash: str
    micro_batch: int = 0
    oom_fallbacks: str = ""
    planned_gib: float | None = None
    dry_run_gib: float | None = None
    measured_gib: float | None = None
    effective: int = 0
    processes: int = 1

    @property
    def batch(self) -> str:
        """How an optimiser step is cut up, for people: micro-batch × accumulation (× processes) = effective batch."""
        one = self.effective // self.processes
        if not one or one % self.micro_batch:  # half of an odd micro-batch leaves a rest
            return f"{self.micro_batch} at most" + (f", effective batch {self.effective}" if one else "")
        of_all = f" × {self.processes} processes" if self.processes > 1 else ""
        return f"{self.micro_batch} × {one // self.micro_batch} accumulated{of_all} = effective batch {self.effective}"

    @property
    def items_per_s(self) -> float:
        """Training throughput, images or tokens (`unit`) per second."""
        return self.items / self.seconds if self.seconds else 0.0

    @property
    def memory_summary(self) -> str:
        """What training was to take and took, for people; empty where nobody asked the plan."""
        figures = {"planned": self.planned_gib, "tried out": self.dry_run_gib, "measured": self.measured_gib}
        return ", ".join(f"{gib:.2f} GiB {name}" for name, gib in figures.items() if gib is not None)

    def _repr_html_(self) -> str:
        from finetune.reporting.notebook import run_html

        return run_html(self)


@dataclass(frozen=True)
class Adapter:
    """An exported adapter: format -> file or folder, and format -> relative difference to the trained module."""

    folder: str
    files: dict[str, str]
    differences: dict[str, float]
    base: str
    trigger: str

    def _repr_html_(self) -> str:
        from finetune.reporting.notebook import adapter_html

        return adapter_html(self)


@dataclass(frozen=True)
class Sample:
    """One image: `file` is tuned, `base_file` the untuned base from the same prompt, seed and noise."""

    prompt: str
    seed: int
    file: str
    base_file: str


@dataclass(frozen=True)
class Samples:
    """Drawn images and the grid that shows base beside tuned; all empty where there were no prompts."""

    folder: str
    grid: str
    items: tuple[Sample, ...]

    @property
    def page(self) -> str:
        """The file that shows all of them."""
        return self.grid

    def _repr_html_(self) -> str:
        from finetune.reporting.notebook import samples_html

        return samples_html(self)


@dataclass(frozen=True)
class Answer:
    """What the base and the tuned model say to one prompt, drawn with the same seed."""

    prompt: str
    seed: int
    base: str
    tuned: str


@dataclass(frozen=True)
class Answers:
    """Written answers; `page` is a Markdown file that shows base beside tuned. All empty without prompts."""

    folder: str
    page: str
    items: tuple[Answer, ...]

    def _repr_html_(self) -> str:
        from finetune.reporting.notebook import answers_html

        return answers_html(self)


@dataclass(frozen=True)
class Report:
    """One self-contained page about the run."""

    file: str


@dataclass(frozen=True)
class Result:
    """Everything that `train` leaves, stage by stage."""

    captions: CaptionSet | None
    dataset: Dataset | TextSet
    run: Run
    adapter: Adapter
    samples: Samples | Answers
    report: Report

    def _repr_html_(self) -> str:
        return "".join(record._repr_html_() for record in (self.samples, self.run, self.adapter, self.dataset))


@dataclass(frozen=True)
class Receipt:
    """Why and how a stage ran: `figures` are what it measured."""

    stage: str
    input_hash: str
    seconds: float
    figures: dict[str, float | int | str | None]
    versions: dict[str, str]
    record: dict[str, Any]


def save_receipt(
    run_dir: Path,
    stage: str,
    record: Any,
    *,
    input_hash: str,
    seconds: float,
    figures: dict[str, float | int | str | None],
) -> None:
    """Write `receipts/STAGE.json` atomically."""
    receipt = Receipt(stage, input_hash, seconds, figures, versions(), asdict(record))
    write_atomically(receipt_path(run_dir, stage), json.dumps(asdict(receipt), indent=2, ensure_ascii=False) + "\n")


def load_receipt(run_dir: Path, stage: str) -> Receipt | None:
    """The stage's receipt, or None if there is none. Raises RunError for a damaged one."""
    path = receipt_path(run_dir, stage)
    if not path.exists():
        return None
    try:
        return from_plain(Receipt, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it and the stage `{stage}` runs again") from error


def load_record(run_dir: Path, stage: str, record_type: type[R], *, input_hash: str | None = None) -> R | None:
    """The record that the stage left, or None if it never ran or (when `input_hash` is given) ran on other inputs."""
    receipt = load_receipt(run_dir, stage)
    if receipt is None or (input_hash is not None and receipt.input_hash != input_hash):
        return None
    return from_plain(record_type, receipt.record)


def receipt_path(run_dir: Path, stage: str) -> Path:
    """Where a stage's receipt lies."""
    return run_dir / "receipts" / f"{stage}.json"


def hash_of(*values: Any) -> str:
    """sha256 (hex) of plain values; equal values hash equally whatever the order of dictionary keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {}
    for package in ("finetune", "torch", "diffusers", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def from_plain(kind: type[R], data: dict[str, Any]) -> R:
    """The inverse of `dataclasses.asdict` for the records above."""
    hints = typing.get_type_hints(kind)
    return kind(**{f.name: _convert(hints[f.name], data[f.name]) for f in fields(kind) if f.name in data})  # type: ignore[arg-type]


def _convert(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None or origin in (typing.Union, types.UnionType):
        return value
    if origin is tuple:
        inner = arguments[0] if arguments[-1] is Ellipsis else None
        return tuple(_convert(inner or arguments[i], item) for i, item in enumerate(value))
    if is_dataclass(hint):
        return from_plain(typing.cast(type[Any], hint), value)
    return value
