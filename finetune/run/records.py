"""What stages hand to one another: frozen values. `finetune.run.plain` reads them back from JSON.

A record with fields that were renamed has a table `RENAMED`, old name -> new name: run folders of earlier versions stay
readable. One with paths in the run folder has a table `INSIDE`, field -> how many of the path's last parts are below
the run folder: receipts hold these parts alone, so that a folder may be copied, renamed and moved. How a record looks
is not said here but in `finetune.reporting`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from finetune.errors import RunError
from finetune.reading import require_file
from finetune.run.hashing import hash_of
from finetune.run.plain import UNREADABLE, first_line, from_plain, require_duration, require_names

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

    def some(self) -> list[Path]:
        """Files of up to eight of the images, evenly spread over all, to be shown beside samples."""
        count = min(8, len(self.items))
        return [Path(self.folder) / self.items[at * len(self.items) // count].file for at in range(count)]


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
    identity_key: ClassVar[str] = "pictures and captions"  # in checkpoints, since the first release: its runs go on
    INSIDE: ClassVar[dict[str, int]] = {"index": 1}

    @property
    def content(self) -> str:
        """Hash of everything that is trained on, and of the split."""
        return hash_of([[example.key, example.caption, example.held_out] for example in self.examples()])[:16]

    def examples(self) -> Iterator[Example]:
        """Every example in the index's order (sorted by file name). Raises RunError for an index that is damaged."""
        try:
            require_file(Path(self.index))
            with open(self.index, encoding="utf-8") as lines:
                for line in lines:
                    yield from_plain(Example, json.loads(line))
        except UNREADABLE as error:
            raise RunError(
                f"{self.index} is damaged ({first_line(error)}); delete it and the same command makes it again"
            ) from error


@dataclass(frozen=True)
class TextSet:
    """Conversations as token rows in the cache folder `rows`.

    train, validation: rows on either side. content: hash of everything that decides ids and masks, and of the split.
    tokens, trained: of all rows, after truncation; truncated_share: of the trained tokens, lost to the length.
    packs: of an epoch; fill_share, trained_share: of their token positions, those with a token and with a trained one.
    preview: one row as text, its trained tokens in ⟦ ⟧. bad: unusable rows, left out. cached: found, not made.
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
    identity_key: ClassVar[str] = content_name
    RENAMED: ClassVar[dict[str, str]] = {
        "lost": "truncated_share",
        "real": "fill_share",
        "learnt": "trained_share",
        "marked": "preview",
    }


@dataclass(frozen=True)
class Run:
    """A finished training run. Seconds count training steps only; losses are means per image or trained token.

    first_loss: of the first step. last_loss: the smoothed one at the end (`run.smoothing`).
    checkpoint: the last one's folder. unit, items: what was trained on, "images" or "tokens", and how many.
    micro_batch: examples in one forward pass at the end. effective: in one optimiser step, of all processes; 0 in
    records from before that was noted. oom_fallbacks: what was changed because memory ran out, empty if nothing.
    peak_gib: the most that this process held so far. planned_gib, dry_run_gib, measured_gib: the most in this training
    with its validation and previews, by the plan, after the dry run, and at the end; None without a GPU or with
    trainer.autotune=off. energy_j: joules that the GPUs of this machine took in energy_s seconds, with validation and
    previews; None where nothing tells.
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
    energy_j: float | None = None
    energy_s: float = 0.0
    RENAMED: ClassVar[dict[str, str]] = {"eased": "oom_fallbacks", "probed_gib": "dry_run_gib"}
    INSIDE: ClassVar[dict[str, int]] = {"folder": 0, "checkpoint": 2}

    def __post_init__(self) -> None:
        require_duration(self.seconds)
        require_duration(self.energy_s)
        require_duration(self.energy_j or 0.0)  # as little beyond bounds as seconds
        if self.processes < 1 or min(self.micro_batch, self.effective, self.steps, self.items, self.total) < 0:
            raise ValueError("a number of something is negative")

    @property
    def items_per_s(self) -> float:
        """Training throughput, images or tokens (`unit`) per second."""
        return self.items / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Adapter:
    """An exported adapter: format -> file or folder, and format -> relative difference to the trained module."""

    folder: str
    files: dict[str, str]
    differences: dict[str, float]
    base: str
    trigger: str
    INSIDE: ClassVar[dict[str, int]] = {"folder": 1}

    def __post_init__(self) -> None:
        require_names(*self.files.values())


@dataclass(frozen=True)
class Sample:
    """One image: `file` is tuned, `base_file` the untuned base from the same prompt, seed and noise."""

    prompt: str
    seed: int
    file: str
    base_file: str

    def __post_init__(self) -> None:
        require_names(self.file, self.base_file)


@dataclass(frozen=True)
class Samples:
    """Drawn images and the grid that shows base beside tuned; all empty where there were no prompts."""

    folder: str
    grid: str
    items: tuple[Sample, ...]
    INSIDE: ClassVar[dict[str, int]] = {"folder": 1, "grid": 2}

    @property
    def page(self) -> str:
        """The file that shows all of them."""
        return self.grid


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
    INSIDE: ClassVar[dict[str, int]] = {"folder": 1, "page": 2}


S = TypeVar("S", Sample, Answer)


@dataclass(frozen=True)
class Report:
    """One self-contained page about the run."""

    file: str
    INSIDE: ClassVar[dict[str, int]] = {"file": 1}


@dataclass(frozen=True)
class Result:
    """Everything that `train` leaves, stage by stage."""

    captions: CaptionSet | None
    dataset: Dataset | TextSet
    run: Run
    adapter: Adapter
    samples: Samples | Answers
    report: Report


def by_prompt(items: Sequence[S]) -> dict[str, list[S]]:
    """Samples or answers by their prompt, in the order in which prompts first come."""
    prompts = dict.fromkeys(item.prompt for item in items)
    return {prompt: [item for item in items if item.prompt == prompt] for prompt in prompts}
