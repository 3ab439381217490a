"""What Python's prompt and `print` show of records."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from finetune.config.compose import load
from finetune.config.describe import as_dict
from finetune.config.schema import Config
from finetune.planning.plan import Plan, Setting
from finetune.reporting.notebook import RENDERERS, html
from finetune.reporting.text import TEXTS
from finetune.run.records import Adapter, Answer, Answers, Caption, CaptionSet, Dataset, Report, Result, Sample, Samples
from tests.unit.reporting.records import parts, returned_records, run_record

SETTING = Setting(2, 4, 0, False, False, 0.5, 8, {"weights": 3.0, "activations": 1.25})
PLAN = Plan(
    "mine", "base", "RTX 4090", 24.0, "bf16", "none", "images", SETTING, SETTING, (), {"training": 4.25}, (), ()
)


def result(folder: Path) -> Result:
    captions = CaptionSet("pics", tuple(Caption(f"{number}.jpg", "a red wall", "user") for number in range(1000)))
    samples = Samples("samples", "samples/grid.png", (Sample("a red wall", 0, "0.png", "1.png"),))
    dataset = Dataset("index", 36, 4, {"128x96": 40}, "empty")
    adapter = Adapter(str(folder / "adapter"), {"peft": "peft"}, {}, "base", "")
    return Result(captions, dataset, run_record(folder), adapter, samples, Report(str(folder / "report.html")))


def test_every_record_that_a_command_returns_has_a_text() -> None:
    assert set(TEXTS) == {Config, *returned_records(), *parts(Result)} == set(RENDERERS)


def test_a_configuration_reads_like_a_recipe() -> None:
    config = load("pixar_style", ["name=mine", "trainer.steps=3", "caption.trigger='größe: 2'"])
    assert "\nlora:\n  rank: 16\n" in repr(config)
    assert yaml.safe_load(repr(config)) == as_dict(config)
    assert "größe" in repr(config)
    assert "<pre>name: mine\n" in html(config)


@pytest.mark.usefixtures("workdir")
def test_a_result_is_short_and_says_what_came_out() -> None:
    whole = result(Path("outputs/mine"))
    title, *lines = repr(whole).splitlines()
    assert title == "train"
    assert {line.strip() for line in lines} >= {
        "loss: 0.5000 → 0.2500 (first step → end, smoothed)",
        "trained on: 16 images (in 4 steps, 0.4 visits an image)",
        "adapter: outputs/mine/adapter",
        "grid: samples/grid.png",
        "report: outputs/mine/report.html",
    }
    assert str(whole) == repr(whole)
    assert "grid: none (sample.prompts is empty)" in repr(replace(whole, samples=Samples("", "", ())))


@pytest.mark.parametrize("name", list(Result.__dataclass_fields__))
def test_every_part_of_a_result_is_short(name: str) -> None:
    part = getattr(result(Path("outputs/mine")), name)
    assert len(repr(part)) < 800
    assert f"{type(part).__name__}(" not in repr(part)


def test_answers_are_read_side_by_side() -> None:
    assert repr(Answers("s", "s/answers.md", (Answer("p", 0, "hello", "ahoy"),))) == (
        "p\n  base:  hello\n  tuned: ahoy\nsamples: s/answers.md"
    )
    assert repr(Answers("", "", ())) == "samples: none (sample.prompts is empty)"


def test_a_plan_says_what_fits_and_what_does_not() -> None:
    shown = repr(PLAN)
    assert max(map(len, shown.splitlines())) <= 80
    for words in ("RTX 4090", "fastest", "2 × 4", "activations", "1.25"):
        assert words in shown
    assert "needs 90 GiB; take another base" in repr(replace(PLAN, problems=("needs 90 GiB; take another base",)))


def test_a_plan_is_plain_where_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in repr(PLAN)
