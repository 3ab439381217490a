"""Progress of long steps: lines without a terminal, and no line twice."""

import re

import pytest

from finetune.run import progress as module
from finetune.run.progress import progress


def test_without_a_terminal_there_are_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PLAIN_LINE_EVERY_S", 0.0)
    with progress("train", 2, unit="steps") as bar:
        bar.advance(1, "loss 0.5")
        bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["train: 1/2 steps, 0 s, loss 0.5", "train: 2/2 steps, 0 s, loss 0.5"]


def test_a_short_step_prints_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("encode", 3, unit="images", done=1) as bar:
        bar.advance(2)
    assert capsys.readouterr().err.splitlines() == ["encode: 3/3 images, 0 s"]


def test_in_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress("train", 4, unit="steps", done=1) as bar:
        bar.advance(3, "loss 0.25")
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "steps" in shown


def test_a_long_text_leaves_room_for_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    with progress("caption", 400, unit="images") as bar:
        bar.advance(200, "a big red robot in a city at night, in the rain, with a small blue cat, pixar style")
    last = [
        line for line in re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", capsys.readouterr().err).split("\r") if line.strip()
    ][-1]
    assert last.rstrip().endswith("a big red robot in …")
    assert last.count("━") >= 10
