"""What an earlier run in the folder left: the images it was trained on, by name, and a way to set it aside."""

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from finetune.reading import read_text
from finetune.run.atomic import write_atomically
from finetune.run.plain import UNREADABLE
from finetune.run.progress import plural, say
from finetune.run.receipts import receipt_path
from finetune.run.records import METRICS, Dataset, TextSet

TRAINED_ON = "trained_on.json"
RESTARTED = "restarted.json"  # which run began with trainer.restart
OUTPUTS = (
    "checkpoints",
    "tensorboard",
    "adapter",
    "samples",
    "samples_more",
    METRICS,
    TRAINED_ON,
    RESTARTED,
    "report.html",
    "config.yaml",
)
NAMED = 3  # file names in a message; the rest is counted


def save_summary(run_dir: Path, dataset: Dataset | TextSet) -> None:
    """Write down what a run begins with, so that a later one can be told what has changed since."""
    if isinstance(dataset, Dataset):
        write_atomically(run_dir / TRAINED_ON, json.dumps(_images(dataset), ensure_ascii=False) + "\n")


def changes(run_dir: Path, dataset: Dataset | TextSet) -> str:
    """How the data set differs from the one that the run began with, such as "1 caption changed: f.jpg"."""
    file = run_dir / TRAINED_ON
    if not isinstance(dataset, Dataset) or not file.exists():
        return f"other {dataset.content_name}"
    try:
        found = list(_differences(json.loads(read_text(file)), _images(dataset)))
    except UNREADABLE:  # only names are lost
        return f"other {dataset.content_name}"
    return ", ".join(found) or "images are cut, mirrored or held out in another way"


def restart(run_dir: Path, input_hash: str) -> None:
    """Set an earlier run aside, unless what is there began with this very restart and isn't finished.

    So the same command goes on after an interrupt. input_hash: of the training that is to begin.
    """
    file = run_dir / RESTARTED
    begun = json.dumps(input_hash) + "\n"
    same = file.is_file() and file.read_text(encoding="utf-8", errors="replace") == begun
    if same and not receipt_path(run_dir, "report").exists():
        say(f"train: this run began with trainer.restart and goes on; to begin again delete {run_dir}/checkpoints")
        return
    set_aside(run_dir)
    write_atomically(file, begun)


def set_aside(run_dir: Path) -> None:
    """Move an earlier run's outputs to `previous-N/`; nothing is deleted."""
    there = [run_dir / name for name in OUTPUTS if (run_dir / name).exists()]
    receipts = [
        path for stage in ("train", "export", "sample", "report") if (path := receipt_path(run_dir, stage)).exists()
    ]
    if not (run_dir / "checkpoints").exists():
        return
    number = next(n for n in itertools.count(1) if not (run_dir / f"previous-{n}").exists())
    target = run_dir / f"previous-{number}"
    target.mkdir()
    for path in [*there, *receipts]:
        shutil.move(path, target / path.name)
    say(f"train: the earlier run is now in {target}")


def _images(dataset: Dataset) -> dict[str, list[str]]:
    """File -> its caption, and the key of the image as it is cut."""
    return {example.file: [example.caption, example.key] for example in dataset.examples() if not example.flipped}


def _differences(before: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> Iterator[str]:
    both = before.keys() & now.keys()
    for thing, how, files in (
        ("caption", "changed", {file for file in both if before[file][0] != now[file][0]}),
        ("image", "changed", {file for file in both if before[file][1] != now[file][1]}),
        ("image", "added", now.keys() - before.keys()),
        ("image", "removed", before.keys() - now.keys()),
    ):
        if files:
            more = f" and {len(files) - NAMED:,} more" if len(files) > NAMED else ""
            yield f"{plural(len(files), thing)} {how}: {', '.join(sorted(files)[:NAMED])}{more}"
