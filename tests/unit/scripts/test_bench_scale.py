"""The benchmark of large sets: data that differ, figures out of what commands leave, and its page."""

import json
from pathlib import Path

import pytest

from finetune.config import compose
from finetune.config.validate import check
from scripts.bench import scale


@pytest.mark.parametrize("kind", ["images", "rows"])
def test_every_command_is_valid(kind: str, tmp_path: Path) -> None:
    words = scale.settings(kind, tmp_path / "base", tmp_path / "data", tmp_path / "out")
    config = compose.load(words[0].removeprefix("conf="), words[1:])
    assert check(config) == []
    assert config.run_dir == str(tmp_path / "out" / "run")


def test_examples_differ(tmp_path: Path) -> None:
    folder = scale.data_of("images", 30, tmp_path)
    assert len({file.read_bytes() for file in folder.glob("*.jpg")}) == 30
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len({row["text"] for row in rows}) == 30
    assert len(set(scale.data_of("rows", 50, tmp_path).read_text().splitlines())) == 50


def test_what_was_kept_is_what_was_not_done_again(tmp_path: Path) -> None:
    said = "dataset: x\ntokens: going on from conversation 2,500\n"
    assert scale.kept_share("rows", 10_000, said, tmp_path) == 0.25
    assert scale.kept_share("rows", 10_000, "dataset: x", tmp_path) == 0.0
    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "dataset.json").write_text(json.dumps({"figures": {"cached": 30, "encoded": 10}}))
    assert scale.kept_share("images", 20, "", tmp_path) == 0.75


def test_the_page_is_made_of_the_lines() -> None:
    lines = [json.loads(line) for line in scale.RESULTS.read_text().splitlines()]
    assert scale.PAGE_FILE.read_text() == scale.page(lines)
    kinds = {line["kind"] for line in lines}
    assert scale.page([*lines, lines[-1] | {"count": 1}]).count("\n| 1 ") == 1
    assert kinds == {"images", "rows"}


def test_what_each_example_costs_is_of_the_difference() -> None:
    figures = {"kind": "rows", "prepare_cpu_s": 1.0, "prepare_gib": 0.5, "first_step_s": 2.0, "train_gib": 0.5}
    more = {"count": 1100, "prepare_cpu_s": 3.0, "prepare_gib": 0.5, "first_step_s": 2.1, "train_gib": 0.5 + 1 / 1024}
    expected = "- rows: 2.0 ms and 0.0 KiB to prepare; 100 µs and 1.0 KiB of a training"
    assert scale.slope([figures | {"count": 100}, figures | more]) == expected


@pytest.mark.exhaustive
def test_a_set_is_measured_through_a_kill(tmp_path: Path) -> None:
    line = scale.measure("images", 400, tmp_path)
    assert 0.2 < line["kept_share"] < 1
    assert line["per_cpu_s"] > 0
    assert 0 < line["step_s"] < line["first_step_s"]
