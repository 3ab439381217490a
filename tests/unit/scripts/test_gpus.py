"""What fits which GPU: docs/gpus.md says what the lines say, and the lines say what the plan says."""

from typing import Any

import pytest

from scripts.bench.gpus import GPUS, PAGE, RESULTS, bases, page, planned, read, table

LINES = read(RESULTS)


def test_every_base_is_planned_on_every_gpu() -> None:
    assert [(line["model"], line["gpu"]) for line in LINES] == [(base, gpu) for base in bases() for gpu in GPUS]


def test_the_page_shows_the_lines() -> None:
    text = PAGE.read_text()
    assert text == page(LINES)
    assert table(LINES) in text


@pytest.mark.exhaustive
def test_the_lines_are_what_the_plan_says() -> None:
    """Of the smallest base; `python -m scripts.bench.gpus` plans all of them again."""
    gpus = ["rtx3060_12gb", "rtx4090"]
    for gpu, found in zip(gpus, planned("tinyllama_1b", gpus), strict=True):
        committed = next(line for line in LINES if (line["model"], line["gpu"]) == ("tinyllama_1b", gpu))
        assert found["gib"] == pytest.approx(committed["gib"], rel=0.005)
        assert found["seconds"] == pytest.approx(committed["seconds"], rel=0.2)  # torch 2.11 launches other operations
        assert {**found, "gib": 0, "seconds": 0, "date": ""} == {**committed, "gib": 0, "seconds": 0, "date": ""}


def line(gpu: str, **others: Any) -> dict[str, Any]:
    fitting = {"settings": ["trainer.micro_batch=2", "model.offload=true"], "gib": 9.96, "seconds": 12.3}
    common = {"model": "some", "gpu": gpu, "quantize": "nf4", "on_cpu": [], "problem": "", "date": "2026-01-02"}
    return {**common, **fitting, **others}


def test_what_does_not_fit_is_shown_with_what_would() -> None:
    hopeless = line("rtx3060_12gb", settings=[], gib=None, seconds=None, problem="training needs 13 GiB; a=b would")
    partly = line("rtx4080", on_cpu=["encoding texts", "export"])
    lines = [hopeless, partly, line("rtx4090"), line("a6000", seconds=2.34)]
    shown = page(lines)
    assert "| `some` | 12 GB (RTX 3060) | nf4 | does not fit: training needs 13 GiB; a=b would | – | – | – |" in shown
    settings = "micro_batch=2 offload=true"
    assert f"| `some` | 16 GB (RTX 4080) | nf4 | {settings} | 10.0 | 12 | encoding texts, export |" in shown
    assert f"| `some` | 48 GB (RTX A6000) | nf4 | {settings} | 10.0 | 2.3 | – |" in shown
    assert "| `some` | no | 12 s ¹ | 12 s | 2.3 s |" in table(lines)
    assert "¹ The GPU is too small for another stage" in table(lines)
    assert "¹" not in table([line(gpu) for gpu in GPUS])


def test_a_base_whose_other_stage_does_not_fit_is_shown_with_its_settings() -> None:
    problem = "validation needs 17 GiB at least; try trainer.validate_every=0"
    rows = [line("rtx4080", problem=problem), *(line(gpu) for gpu in GPUS if gpu != "rtx4080")]
    assert f"| does not fit: {problem} | 10.0 | 12 | – |" in page(rows)
