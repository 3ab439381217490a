"""A run's curves: read from `metrics.jsonl`, arranged into charts."""

import re
from pathlib import Path

from finetune.reporting.charts import ORANGE, SHADES, Line, line_chart
from finetune.run.metrics import read_rows

Points = list[tuple[float, float]]
Curves = dict[str, Points]
"""Tag ("loss/step") -> (step, value) in the order of steps."""

SMOOTHING = 0.9  # share of the old value in curves that are smoothed for the eye only
LEVELS = re.compile(r"validation/t=([0-9]+)")
PERPLEXITY = "validation/perplexity"
SPEED = re.compile(r"train/(\w+)_per_s", re.ASCII)


def read(run_dir: Path) -> Curves:
    """Every curve of the run; none without a metrics.jsonl. Damaged lines and what was not finite is left out."""
    curves: Curves = {}
    for row in read_rows(run_dir):
        for tag, value in row.values.items():
            curves.setdefault(tag, []).append((row.step, value))
    return curves


def loss(curves: Curves) -> str:
    """The loss of each step, faint, and smoothed."""
    lines = [
        Line("each step", curves.get("loss/step", []), faint=True),
        Line("smoothed", curves.get("loss/smoothed", [])),
    ]
    return line_chart("Training loss", lines, y_label="loss")


def charts(curves: Curves, best_step: int | None) -> list[str]:
    """Every chart that the run has points for. best_step: that of the best checkpoint."""
    mean, perplexity, norms = (curves.get(tag, []) for tag in ("validation/mean", PERPLEXITY, "train/gradient_norm"))
    perplexity = [(step, value) for step, value in perplexity if value > 0]  # as each is, and its axis is logarithmic
    measure = "nats per token" if perplexity else "mean squared error"
    norm_lines = [Line("each step", norms, faint=True), Line("smoothed", _smoothed(norms))]
    speed = next((tag for tag in curves if SPEED.fullmatch(tag)), "")
    drawn = [
        loss(curves),
        line_chart(
            "Validation loss", [Line("mean", mean, ORANGE)], y_label=measure, mark=_best(mean, best_step, "best ")
        ),
        line_chart(  # a base that never met such answers starts thousands of times higher
            "Perplexity",
            [Line("", perplexity, ORANGE)],
            y_label="perplexity",
            log=True,
            mark=_best(perplexity, best_step),
        ),
        line_chart("Validation by noise level (high t: noisy)", _levels(curves), y_label="change since step 0, %"),
        _alone("Learning rate", curves.get("train/learning_rate", []), "rate"),
        line_chart("Gradient norm", norm_lines, y_label="norm before clipping", zero=True),
        _alone("Speed", curves.get(speed, []), SPEED.sub(r"\1/s", speed)),
        _alone("Memory", curves.get("system/memory_gib", []), "GiB in use"),
    ]
    return [chart for chart in drawn if chart]


def _alone(title: str, points: Points, y_label: str) -> str:
    return line_chart(title, [Line("", points)], y_label=y_label, zero=True)


def _levels(curves: Curves) -> list[Line]:
    """Validation loss relative to its start, a line per noise level: levels differ a hundredfold in size."""
    found = ((LEVELS.fullmatch(tag), points) for tag, points in curves.items())
    levels = sorted((int(match[1]), points) for match, points in found if match)
    return [
        Line(
            f"t={level}",
            [(x, 100 * (y / points[0][1] - 1)) for x, y in points] if points[0][1] else [],
            SHADES[index * len(SHADES) // len(levels)],
        )
        for index, (level, points) in enumerate(levels)
    ]


def _smoothed(points: Points) -> Points:
    smoothed: Points = []
    for x, y in points:
        old = smoothed[-1][1] if smoothed else y
        smoothed.append((x, SMOOTHING * old + (1 - SMOOTHING) * y))
    return smoothed


def _best(points: Points, best_step: int | None, word: str = "") -> tuple[float, float, str] | None:
    return next(((x, y, f"{word}{y:.4g}") for x, y in points if x == best_step), None)
