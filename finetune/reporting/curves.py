"""A run's curves: read from `metrics.jsonl`, arranged into charts."""

import json
import re
from pathlib import Path

from finetune.reporting.charts import Line, Mark, line_chart
from finetune.run.records import METRICS

Curves = dict[str, list[tuple[float, float]]]
"""Tag ("loss/step") -> (step, value) in the order of steps."""

SMOOTHING = 0.9  # share of the old value in curves that are smoothed for the eye only
LEVELS = "validation/t="
PERPLEXITY = "validation/perplexity"
SPEED = re.compile(r"train/(\w+)_per_s")
FIRST_LEVEL_TONE, LEVEL_TONES = 3, 5


def read(run_dir: Path) -> Curves:
    """Every curve of the run; none without a metrics.jsonl. Values that weren't finite and half lines are left out."""
    curves: Curves = {}
    try:
        lines = (run_dir / METRICS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return curves
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        step = values.pop("step")
        for tag, value in values.items():
            if value is not None:
                curves.setdefault(tag, []).append((step, value))
    return curves


def loss(curves: Curves) -> str:
    """Loss of each step, faint, and smoothed."""
    lines = [
        Line("each step", curves.get("loss/step", []), faint=True),
        Line("smoothed", curves.get("loss/smoothed", [])),
    ]
    return line_chart("Training loss", lines, y_label="loss")


def validation(curves: Curves, best_step: int | None) -> str:
    """Validation loss, with the step whose checkpoint was best."""
    points = curves.get("validation/mean", [])
    measure = "nats a token" if PERPLEXITY in curves else "mean squared error"
    return line_chart(
        "Validation loss", [Line("mean", points, tone=2)], y_label=measure, mark=_best(points, best_step, "best ")
    )


def perplexity(curves: Curves, best_step: int | None) -> str:
    """Perplexity of the held-out conversations, with that of the best checkpoint."""
    points = curves.get(PERPLEXITY, [])
    mark = _best(points, best_step)  # a base that never heard the voice begins thousands of times higher
    return line_chart("Perplexity", [Line("", points, tone=2)], y_label="perplexity", log=True, mark=mark)


def validation_by_level(curves: Curves) -> str:
    """Validation loss relative to its start, a line per noise level: levels differ a hundredfold in size."""
    levels = sorted((int(tag.removeprefix(LEVELS)), points) for tag, points in curves.items() if tag.startswith(LEVELS))
    lines = [
        Line(
            f"t={level}",
            [(x, 100 * (y / points[0][1] - 1)) for x, y in points] if points[0][1] else [],
            tone=FIRST_LEVEL_TONE + index * LEVEL_TONES // len(levels),
        )
        for index, (level, points) in enumerate(levels)
    ]
    return line_chart("Validation by noise level (high t: noisy)", lines, y_label="change since step 0, %")


def learning_rate(curves: Curves) -> str:
    """Learning rate of each step."""
    return line_chart("Learning rate", [Line("", curves.get("train/learning_rate", []))], y_label="rate", zero=True)


def gradient_norm(curves: Curves) -> str:
    """Gradient norm before clipping, faint, and smoothed."""
    points = curves.get("train/gradient_norm", [])
    lines = [Line("each step", points, faint=True), Line("smoothed", _smoothed(points))]
    return line_chart("Gradient norm", lines, y_label="norm before clipping", zero=True)


def speed(curves: Curves) -> str:
    """Images or tokens per second, whichever the run counted."""
    tag = next((tag for tag in curves if SPEED.fullmatch(tag)), "")
    unit = SPEED.sub(r"\1/s", tag)
    return line_chart("Speed", [Line("", curves.get(tag, []))], y_label=unit, zero=True)


def memory(curves: Curves) -> str:
    """Memory in use."""
    return line_chart("Memory", [Line("", curves.get("system/memory_gib", []))], y_label="GiB in use", zero=True)


def _best(points: list[tuple[float, float]], best_step: int | None, word: str = "") -> Mark | None:
    return next((Mark(x, y, f"{word}{y:.4g}") for x, y in points if x == best_step), None)


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    smoothed: list[tuple[float, float]] = []
    for x, y in points:
        old = smoothed[-1][1] if smoothed else y
        smoothed.append((x, SMOOTHING * old + (1 - SMOOTHING) * y))
    return smoothed
