"""The run's curves in `metrics.jsonl`, one JSON line per logged step.

They are for display only, so damage in them costs no run: it is reported and left out.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.reading import read_bytes
from finetune.run.plain import UNREADABLE
from finetune.run.progress import plural, say
from finetune.run.records import METRICS

LARGEST, SMALLEST = 1e150, 1e-150  # charts square and divide what they draw, and no fp32 value is near either


@dataclass(frozen=True)
class Row:
    """One line. values: tag -> value, without those that were not finite."""

    line: str
    step: int
    values: dict[str, float]


def read_rows(run_dir: Path) -> list[Row]:
    """Every whole line; none without the file. Damaged ones are reported, save a last one that a kill cut short."""
    file = run_dir / METRICS
    try:
        *lines, cut = read_bytes(file).decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        say(f"warning: {file} can't be read ({error.strerror}); the curves in it are left out")
        return []
    rows = [_row(line) for line in lines if line.strip()]
    if bad := rows.count(None):
        say(f"warning: {plural(bad, 'line')} of {file} damaged; left out of the curves")
    return [row for row in [*rows, _row(cut)] if row]


def _row(line: str) -> Row | None:
    try:
        values = json.loads(line)
        step = values.pop("step")
        if type(step) is not int or not 0 <= step < LARGEST:
            return None
        return Row(line, step, {tag: _number(value) for tag, value in values.items() if value is not None})
    except UNREADABLE:
        return None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not abs(value) < LARGEST:
        raise ValueError
    return float(value) if abs(value) > SMALLEST else 0.0
