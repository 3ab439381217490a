"""What a run on conversations leaves on the screen; `test_cli` has that of a run on images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import Config
from finetune.reporting import terminal
from finetune.run.records import Adapter, Answer, Answers, Report, Result, save_receipt
from tests.unit.reporting.test_notebook import run_record, text_set

ANSWERS = Answers("outputs/mine/samples", "outputs/mine/samples/answers.md", (Answer("p", 0, "hello", "ahoy"),))


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (text_set(), "dataset: 180 rows to train, 20 held out; 20,000 tokens, 5,000 of them trained"),
        (ANSWERS, "p\n  base:  hello\n  tuned: ahoy\nsamples: outputs/mine/samples/answers.md"),
    ],
)
def test_each_stage_ends_with_a_line(capsys: pytest.CaptureFixture[str], record: Any, line: str) -> None:
    terminal.show(Config(), record)
    assert capsys.readouterr().out == line + "\n"


def test_train_ends_with_a_table_and_the_next_commands(capsys: pytest.CaptureFixture[str], workdir: Path) -> None:
    config = Config(name="mine", run_dir="outputs/mine")
    save_receipt(Path(config.run_dir), "train", Report("x"), input_hash="", seconds=61.0, figures={})
    tried = {"planned_gib": 19.0, "probed_gib": 19.11, "measured_gib": 19.2}
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
    terminal.show(config, Result(None, text_set(), run, adapter, ANSWERS, Report("outputs/mine/report.html")))
    out = capsys.readouterr().out
    assert max(map(len, out.split("next\n")[0].splitlines())) <= 80
    for words in (
        "2.0 tokens/s",
        " answers ",
        " 2 × 4 accumulated × 2 processes = effective batch 16",
        "19.00 GiB planned, 19.11 GiB tried out, 19.20 GiB measured",
        "ran out; went on with micro-batch 2 instead of 4",
        "outputs/mine/samples/answers.md",
        'sample.prompts=["What colour is the',
    ):
        assert words in out
    assert "grid" not in out
    assert "that were trained on" not in out
    none = replace(text_set(), validation=0)
    terminal.show(config, Result(None, none, run, adapter, ANSWERS, Report("outputs/mine/report.html")))
    assert ", on examples that were trained on" in " ".join(capsys.readouterr().out.split())
    undrawn = Answers("", "", ())
    terminal.show(config, Result(None, text_set(), run, adapter, undrawn, Report("outputs/mine/report.html")))
    assert "answers none (sample.prompts is empty)" in " ".join(capsys.readouterr().out.split())
