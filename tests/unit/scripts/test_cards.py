"""What fits which card: README and docs/cards.md say what the lines say, and the lines what the plan says."""

from typing import Any

import pytest

from scripts.bench.cards import CARDS, PAGE, README, RESULTS, bases, page, planned, read, table, with_table

LINES = read(RESULTS)


def test_every_base_is_planned_on_every_card() -> None:
    assert [(line["model"], line["card"]) for line in LINES] == [(base, card) for base in bases() for card in CARDS]


def test_the_pages_show_the_lines() -> None:
    text = README.read_text()
    assert with_table(text, LINES) == text
    assert table(LINES) in text
    assert PAGE.read_text() == page(LINES)


@pytest.mark.slow
@pytest.mark.parametrize("card", ["rtx3060_12gb", "rtx4090"])
def test_the_lines_are_what_the_plan_says(card: str) -> None:
    """Of the smallest base; `python -m scripts.bench.cards` plans all of them again."""
    (found,) = planned("tinyllama_1b", [card])
    committed = next(line for line in LINES if (line["model"], line["card"]) == ("tinyllama_1b", card))
    assert found["gib"] == pytest.approx(committed["gib"], rel=0.005)
    assert found["seconds"] == pytest.approx(committed["seconds"], rel=0.005)
    assert {**found, "gib": 0, "seconds": 0, "date": ""} == {**committed, "gib": 0, "seconds": 0, "date": ""}


def line(card: str, **others: Any) -> dict[str, Any]:
    fitting = {"settings": ["trainer.micro_batch=2", "model.offload=true"], "gib": 9.96, "seconds": 12.3}
    common = {"model": "some", "card": card, "quantize": "nf4", "main_memory": [], "problem": "", "date": "2026-01-02"}
    return {**common, **fitting, **others}


def test_what_does_not_fit_is_told_with_what_would() -> None:
    hopeless = line("rtx3060_12gb", settings=[], gib=None, seconds=None, problem="training needs 13 GiB; a=b would")
    partly = line("rtx4080", main_memory=["encoding texts", "export"])
    lines = [hopeless, partly, line("rtx4090"), line("a6000", seconds=2.34)]
    shown = page(lines)
    assert "| `some` | 12 GB (RTX 3060) | nf4 | does not fit: training needs 13 GiB; a=b would | – | – | – |" in shown
    settings = "micro_batch=2 offload=true"
    assert f"| `some` | 16 GB (RTX 4080) | nf4 | {settings} | 10.0 | 12 | encoding texts, export |" in shown
    assert f"| `some` | 48 GB (RTX A6000) | nf4 | {settings} | 10.0 | 2.3 | – |" in shown
    assert "| `some` | no | 12 s ¹ | 12 s | 2.3 s |" in table(lines)
    assert "¹ The card is too small for another stage" in table(lines)
    assert "¹" not in table([line(card) for card in CARDS])


def test_a_base_whose_other_stage_fits_nowhere_is_told_with_its_settings() -> None:
    shown = page([line("rtx4080", problem="validation needs 17 GiB at least; try trainer.validate_every=0")])
    assert "| does not fit: validation needs 17 GiB at least; try trainer.validate_every=0 | 10.0 | 12 | – |" in shown
