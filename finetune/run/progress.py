"""Progress of long steps: a rich bar in a terminal, in a notebook another, a plain line now and then
elsewhere.

Of several processes only the first one speaks.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, Protocol

from finetune.run import ranks

BAR_AND_FIGURES, LEAST_TEXT = 60, 12  # columns of a terminal; a long text, such as a caption, would squeeze the bar
NO_CURSOR = ("dumb", "unknown")  # values of TERM: a shell inside an editor shows a bar at its end only
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but for line ends and tabs: a terminal obeys them
WARNING = re.compile(r"(?:\w+: )?warning: ")
NOTEBOOK_EVERY_S = 0.25  # each is a message to the browser
FIRST_LINE_S = 2.0  # of something that seldom takes long; nobody waits so long without wondering
PLAIN_LINE_EVERY_S = 10.0  # without a terminal (logs, CI): often enough to see life, rare enough to read

_warnings: list[str] = []  # of this process, until a receipt takes them


class Progress(Protocol):
    """What a long step calls: `advance` by finished units, with a short text such as the loss."""

    def advance(self, amount: int = 1, text: str = "") -> None: ...


@contextmanager
def progress(title: str, total: int, *, unit: str, done: int = 0) -> Iterator[Progress]:
    """A progress display for `total` units, `done` of which were finished earlier."""
    if sys.stderr.isatty() and os.environ.get("TERM") not in NO_CURSOR and ranks.rank() == 0:
        with _bar(title, total, unit, done) as shown:
            yield shown
    else:
        notebook = in_notebook()
        every_s = NOTEBOOK_EVERY_S if notebook else PLAIN_LINE_EVERY_S
        show = _notebook_bar() if notebook else _say_line
        counted = _Counted(title, total, unit, done, every_s=every_s, show=show)
        yield counted
        counted.finish()


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this program."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def say(line: str) -> None:
    """One line for the person at the terminal; a warning is kept for the receipt of its stage too."""
    if ranks.rank():
        return
    if found := WARNING.match(line):
        _warnings.append(line[found.end() :])
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()


def printable(text: str) -> str:
    """With control characters spelt out: names and texts of a data set are anybody's."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def taken_warnings() -> tuple[str, ...]:
    """Those that were said since the last call."""
    found = tuple(dict.fromkeys(_warnings))
    _warnings.clear()
    return found


def plural(count: int, thing: str) -> str:
    """ "1 image", "2 images"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def size_text(size: float) -> str:
    """ "5.7 MB", of bytes."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


class Silence:
    """Since when nothing was said of a step that seldom takes long."""

    def __init__(self) -> None:
        self.ends = time.monotonic() + FIRST_LINE_S

    def is_long(self) -> bool:
        """Whether a line is due; then the next one is in a while."""
        now = time.monotonic()
        if now < self.ends:
            return False
        self.ends = now + PLAIN_LINE_EVERY_S
        return True


class _Counted:
    """Counts, and hands what is to be shown to `show` every so often: a line, and the share that is done."""

    def __init__(
        self, title: str, total: int, unit: str, done: int, *, every_s: float, show: Callable[[str, float], object]
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.every_s, self.show = every_s, show
        self.start = self.last = time.monotonic()
        self.text = ""
        self.said = -1

    def advance(self, amount: int = 1, text: str = "") -> None:
        self.done += amount
        self.text = text or self.text
        if time.monotonic() - self.last >= self.every_s:
            self.last = time.monotonic()
            self._show()

    def finish(self) -> None:
        if self.said != self.done:
            self._show()

    def _show(self) -> None:
        seconds = time.monotonic() - self.start
        self.said = self.done
        parts = [f"{self.title}: {self.done}/{self.total} {self.unit}", f"{seconds:.0f} s", self.text]
        self.show(", ".join(part for part in parts if part), self.done / max(1, self.total))


def _say_line(line: str, _share: float) -> None:
    say(line)


def _notebook_bar() -> Callable[[str, float], object]:
    """Shows a line beside a bar in the notebook's cell, always the newest."""
    from IPython.display import display

    shown: list[Any] = []

    def show(line: str, share: float) -> None:
        bar = f'<progress value="{share:.4f}" style="width:16em"></progress> {escape(line)}'
        data = {"text/html": bar, "text/plain": line}
        if shown:
            shown[0].update(data, raw=True)
        else:
            shown.append(display(data, raw=True, display_id=True))  # type: ignore[no-untyped-call]

    return show


@contextmanager
def _bar(title: str, total: int, unit: str, done: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    console = Console(stderr=True)
    wide = console.width >= BAR_AND_FIGURES
    whole = Column(no_wrap=True)  # the bar shrinks, not the figures
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(table_column=whole),
        TextColumn(unit),
        *((TimeElapsedColumn(whole),) if wide else ()),
        TimeRemainingColumn(table_column=whole),
        *((TextColumn("{task.fields[text]}", markup=False),) if wide else ()),
    )
    room = max(LEAST_TEXT, console.width - BAR_AND_FIGURES)
    with RichProgress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total, completed=done, text="")

        class Bar:
            def advance(self, amount: int = 1, text: str = "") -> None:
                if text := printable(text):
                    bars.update(task, text=text if len(text) <= room else text[: room - 1] + "…")
                bars.advance(task, amount)

        yield Bar()


def shortened(text: str, most: int = 1000) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"
