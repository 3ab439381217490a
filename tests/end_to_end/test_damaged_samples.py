"""Damage in a run's samples/: `sample` and `train` make them again, `report` says what is wrong or leaves it out."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.errors import RunError
from finetune.reporting import notebook
from finetune.run.receipts import load_record
from finetune.run.records import Samples
from finetune.serving.runs import Runs
from tests.end_to_end.damage import assert_made_again, contents, cut, replaced

pytestmark = pytest.mark.sampled


Cli = Callable[..., Any]
TUNED, LIST = "000-seed0-tuned.png", "samples.jsonl"


def _file_for_a_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


IMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": cut(TUNED),
    "gone": lambda folder: (folder / TUNED).unlink(),
    "a text": replaced(TUNED, lambda file: file.write_text("no image")),
    "of another format": replaced(TUNED, lambda file: Image.new("RGB", (8, 8)).save(file, "TIFF")),
    "a folder": replaced(TUNED, Path.mkdir),
    "a pipe": replaced(TUNED, os.mkfifo),
    "a link to itself": replaced(TUNED, lambda file: file.symlink_to(file.name)),
    "the page a folder": replaced("grid.png", Path.mkdir),
}
LISTS: dict[str, Callable[[Path], Any]] = {
    "a folder": replaced(LIST, Path.mkdir),
    "a pipe": replaced(LIST, os.mkfifo),
    "an image": replaced(LIST, lambda file: Image.new("RGB", (8, 8)).save(file, "PNG")),
    "in a file": _file_for_a_folder,
}
NOT_KEPT = ("gone", "a folder", "a pipe", "a link to itself", "the page a folder")


@pytest.mark.parametrize("name", IMAGES)
def test_a_damaged_image_is_left_out_and_drawn_again(finetune_cli: Cli, trained: Path, name: str) -> None:
    whole = contents(trained / "samples")
    IMAGES[name](trained / "samples")
    assert finetune_cli("report", f"run_dir={trained}").code == 0
    shown = name in ("of another format", "the page a folder")
    assert ("image is gone" in (trained / "report.html").read_text()) is not shown
    (item,) = Runs(Path()).samples("run")["items"]
    assert {side: item[side] is not None for side in ("base", "tuned")} == {"base": True, "tuned": shown}
    record = load_record(trained, "sample", Samples)
    assert record is not None
    assert ("can't be shown" in notebook.html(record)) == (name == "the page a folder")
    assert_made_again(finetune_cli, trained, whole, keeps=name not in NOT_KEPT)


@pytest.mark.parametrize("name", LISTS)
def test_a_damaged_list_is_named_and_made_again(finetune_cli: Cli, trained: Path, name: str) -> None:
    whole = contents(trained / "samples")
    LISTS[name](trained / "samples")
    refused = finetune_cli("report", f"run_dir={trained}")
    assert refused.code == RunError.exit_code
    (line,) = [line for line in refused.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {trained / 'samples' / LIST} is damaged (")
    assert_made_again(finetune_cli, trained, whole, keeps=name not in NOT_KEPT)


def test_the_command_that_trained_makes_samples_again_too(finetune_cli: Cli, trained: Path, small: list[str]) -> None:
    whole = contents(trained / "samples")
    cut(TUNED)(trained / "samples")
    (trained / "samples" / LIST).unlink()
    assert finetune_cli("train", *small).code == 0
    assert contents(trained / "samples") == whole
    assert "image is gone" not in (trained / "report.html").read_text()
