"""What a run on conversations leaves on the screen; `test_cli` has that of a run on images."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import Config
from finetune.reporting import notebook, terminal
from finetune.run.receipts import save_receipt
from finetune.run.records import (
    Adapter,
    Answer,
    Answers,
    Caption,
    CaptionSet,
    Dataset,
    Report,
    Result,
    Samples,
    TextSet,
)
from tests.unit.reporting.records import run_record, text_set

CAPTIONS = CaptionSet("pics", (Caption("a.jpg", "a", "generated"),))
ANSWERS = Answers("outputs/mine/samples", "outputs/mine/samples/answers.md", (Answer("p", 0, "hello", "ahoy"),))


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (CAPTIONS, "captions: 1 image, 1 captioned by the model, 0 by you; correct them in pics/metadata.jsonl"),
        (Adapter("out/adapter", {"peft": "peft"}, {}, "base", ""), "adapter: out/adapter (peft)"),
        (Samples("s", "s/grid.png", ()), "samples: s/grid.png"),
        (Report("report.html"), "report: report.html"),
        (ANSWERS, "p\n  base:  hello\n  tuned: ahoy\nsamples: outputs/mine/samples/answers.md"),
    ],
)
def test_each_stage_ends_with_a_line(capsys: pytest.CaptureFixture[str], record: Any, line: str) -> None:
    terminal.show(Config(), record, began=0.0)
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        (text_set(), {"rows to train on: 180", "rows held out: 20", "tokens: 20,000", "trained tokens: 5,000 (25.0%)"}),
        (Dataset("i", 9, 1, {"128x128": 10}, "e"), {"to train on: 9", "held out: 1", "buckets: 10 of 128x128 pixels"}),
    ],
)
def test_a_data_set_ends_with_its_figures(capsys: pytest.CaptureFixture[str], record: Any, facts: set[str]) -> None:
    terminal.show(Config(), record, began=0.0)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "dataset"
    assert {line.strip() for line in lines} >= facts
    if isinstance(record, TextSet):
        assert [line.strip() for line in lines[-2:]] == record.preview.splitlines()
        assert "⟦" in record.preview
        terminal.show(Config(), replace(record, preview="long " * 1000), began=0.0)
        assert len(capsys.readouterr().out) < 2000


@dataclass(frozen=True)
class Undescribed:
    run_dir: str
    change: dict[str, float]


def test_a_row_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(Config(), text_set(preview="a\x1b]0;title\x07\n⟦b⟧"), began=0.0)
    assert capsys.readouterr().out.endswith("  a\\x1b]0;title\\x07\n  ⟦b⟧\n")


def test_a_record_that_nobody_describes_is_shown_by_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    record = Undescribed("outputs/<mine>", {"layer.0": 0.123456, "layer.1": 0.1})
    terminal.show(Config(), record, began=0.0)
    assert capsys.readouterr().out == "undescribed\n  run dir: outputs/<mine>\n  layer.0: 0.1235\n  layer.1: 0.1\n"
    notebook.give_look(Undescribed)
    shown = record._repr_html_()  # type: ignore[attr-defined]
    assert all(words in shown for words in ("undescribed", "run dir", "outputs/&lt;mine&gt;", "layer.0", "0.1235"))


def test_train_ends_with_a_table_and_the_next_commands(capsys: pytest.CaptureFixture[str], workdir: Path) -> None:
    config = Config(name="mine", run_dir="outputs/mine")
    save_receipt(Path(config.run_dir), "train", Report("x"), input_hash="", seconds=61.0, figures={})
    tried = {"planned_gib": 19.0, "dry_run_gib": 19.11, "measured_gib": 19.2}
    run = run_record(
        Path("outputs/mine"),
        unit="tokens",
        micro_batch=2,
        effective=16,
        processes=2,
        oom_fallbacks="micro-batch 2 instead of 4",
        **tried,
    )
    adapter = Adapter("outputs/mine/adapter", {}, {}, "base", "")
    whole = Result(None, text_set(), run, adapter, ANSWERS, Report("outputs/mine/report.html"))
    terminal.show(config, whole, began=time.time())
    out = capsys.readouterr().out
    assert max(map(len, out.split("next\n")[0].splitlines())) <= 80
    for words in (
        "2.0 tokens/s",
        "\nanswers ",
        "16 (2 × 4 accumulated, 2 processes)",
        "1.50 GiB (planned 19.00, dry run 19.11, training 19.20)",
        "memory ran out      continued with micro-batch 2 instead of 4",
        "outputs/mine/samples/answers.md",
        'sample.prompts=["What colour is the',
    ):
        assert words in out
    assert "grid" not in out
    assert "on training examples" not in out
    terminal.show(config, replace(whole, dataset=replace(text_set(), validation=0)), began=time.time())
    assert ", on training examples)" in " ".join(capsys.readouterr().out.split())
    terminal.show(config, replace(whole, samples=Answers("", "", ())), began=time.time())
    assert "answers none (sample.prompts is empty)" in " ".join(capsys.readouterr().out.split())
