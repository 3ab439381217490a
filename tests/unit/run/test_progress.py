"""Progress of long steps: lines without a terminal, and no line twice."""

import re
from collections.abc import Callable

import pytest

from finetune.run import progress as module
from finetune.run.progress import progress, say


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


@pytest.fixture
def in_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Advances once in a terminal; returns the lines shown, each state of a bar as one."""

    def shown(title: str, total: int, *, unit: str, done: int = 0, advance: int, text: str = "") -> list[str]:
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        with progress(title, total, unit=unit, done=done) as bar:
            bar.advance(advance, text)
        plain = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", capsys.readouterr().err)
        return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]

    return shown


def test_in_a_terminal_there_is_a_bar(in_terminal: Callable[..., list[str]]) -> None:
    last = in_terminal("train", 4, unit="steps", done=1, advance=3, text="loss 0.25")[-1]
    assert "━━━━ 4/4 steps" in last
    assert last.endswith("loss 0.25")


CAPTION = "a big red robot in a city at night, in the rain, with a small blue cat, pixar style"


def test_a_long_text_leaves_room_for_the_bar(in_terminal: Callable[..., list[str]]) -> None:
    last = in_terminal("caption", 400, unit="images", advance=200, text=CAPTION)[-1]
    assert last.endswith("a big red robot in …")
    assert last.count("━") >= 10


def test_texts_of_a_data_set_are_shown_and_not_obeyed(
    in_terminal: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "[/b] [x] \x1b]0;title\x07\x9b31m\r"
    last = in_terminal("caption", 4, unit="images", advance=4, text=text)[-1]
    assert last.endswith(r"[/b] [x] \x1b]0;tit…")
    say(f"ü {text}\tb")
    assert capsys.readouterr().err == "ü [/b] [x] \\x1b]0;title\\x07\\x9b31m\\r\tb\n"


def test_a_narrow_terminal_shows_the_whole_count(
    in_terminal: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    last = in_terminal("caption", 4000, unit="images", advance=2000, text=CAPTION)[-1]
    assert "━ 2000/4000 images " in last
    assert len(last) <= 40


def test_without_colours_the_bar_shows_what_is_done(
    in_terminal: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert re.search("━[━╸]  ", in_terminal("train", 4, unit="steps", advance=2)[-1])


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_without_a_cursor_gets_plain_lines(
    in_terminal: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    monkeypatch.setenv("TERM", term)
    lines = in_terminal("train", 2, unit="steps", advance=2, text="loss 0.5")
    assert lines == ["train: 2/2 steps, 0 s, loss 0.5"]
