"""metrics.jsonl is for display: whatever is damaged in it is reported and left out."""

import json
from pathlib import Path

import pytest

from finetune.reporting import curves
from finetune.run.metrics import read_rows
from finetune.run.records import METRICS

GOOD = '{"step": 1, "loss/step": 2.5, "train/gradient_norm": null}'
BAD = [
    *("[]", "5", "null", '"text"', "{", "{}", '{"step": "1"}', '{"step": true}', '{"step": -1}', '{"step": 1.5}'),
    *('{"step": 1, "loss/step": "<b>"}', '{"step": 1, "loss/step": [1]}', '{"step": 1, "loss/step": true}'),
    *('{"step": 1, "loss/step": NaN}', '{"step": 1, "loss/step": 1e400}', f'{{"step": 1, "x": 1{"0" * 400}}}'),
    "[" * 100_000,
]


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_damaged_line_is_reported_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    (tmp_path / METRICS).write_text(f"{GOOD}\n{line}\n{GOOD.replace('1', '2', 1)}\n")
    assert [(row.step, row.values) for row in read_rows(tmp_path)] == [(1, {"loss/step": 2.5}), (2, {"loss/step": 2.5})]
    assert capsys.readouterr().err == f"warning: 1 line of {tmp_path / METRICS} damaged; left out of the curves\n"
    assert curves.read(tmp_path) == {"loss/step": [(1, 2.5), (2, 2.5)]}


def test_bytes_that_are_no_text_and_a_line_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / METRICS).write_bytes(GOOD.encode() + b"\n\xff\xfe\x00\n" + GOOD.encode() + b"\n" + GOOD.encode()[:9])
    assert [row.step for row in read_rows(tmp_path)] == [1, 1]
    assert "1 line of" in capsys.readouterr().err  # the last one is what any kill leaves


def test_a_file_that_cannot_be_read_is_no_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_rows(tmp_path) == []
    assert capsys.readouterr().err == ""
    (tmp_path / METRICS).mkdir()
    assert read_rows(tmp_path) == []
    assert "can't be read" in capsys.readouterr().err


def test_odd_numbers_and_tags_are_drawn(tmp_path: Path) -> None:
    values = {"validation/t=abc": 1.0, "validation/t=5": 5e-324, "validation/perplexity": 0, "train/<b>_per_s": 1}
    lines = [json.dumps({"step": step, "loss/step": value, **values}) for step, value in ((0, 1e149), (1, -1e149))]
    (tmp_path / METRICS).write_text("\n".join(lines) + "\n")
    drawn = "".join(curves.charts(curves.read(tmp_path), best_step=0))
    assert "<svg" in drawn
    assert "<b>_per" not in drawn
