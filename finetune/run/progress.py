"""Progress of long steps: a rich bar in a terminal, a plain line now and then without one.

Of several processes only the first one speaks.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from finetune.run import ranks

BAR_AND_FIGURES, LEAST_TEXT = 60, 12  # columns of a terminal; a long text, such as a caption, would squeeze the bar
NO_CURSOR = ("dumb", "unknown")  # values of TERM: a shell inside an editor shows a bar at its end only
WARNING = re.compile(r"(?:\w+: )?warning: ")
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
        plain = _Plain(title, total, unit, done)
        yield plain
        plain.finish()


def say(line: str) -> None:
    """One line for the person at the terminal; a warning is kept for the receipt of its stage too."""
    if ranks.rank():
        return
    if found := WARNING.match(line):
        _warnings.append(line[found.end() :])
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def taken_warnings() -> tuple[str, ...]:
    """Those that were said since the last call."""
    found = tuple(dict.fromkeys(_warnings))
    _warnings.clear()
    return found


def plural(count: int, thing: str) -> str:
    """ "1 image", "2 images"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


class _Plain:
    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.start = self.last = time.monotonic()
        self.text = ""
        self.said = -1

    def advance(self, amount: int = 1, text: str = "") -> None:
        self.done += amount
        self.text = text or self.text
        if time.monotonic() - self.last >= PLAIN_LINE_EVERY_S:
            self.last = time.monotonic()
            self._line()

    def finish(self) -> None:
        if self.said != self.done:
            self._line()

    def _line(self) -> None:
        seconds = time.monotonic() - self.start
        self.said = self.done
        parts = [f"{self.title}: {self.done}/{self.total} {self.unit}", f"{seconds:.0f} s", self.text]
        say(", ".join(part for part in parts if part))


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
        *((TextColumn("{task.fields[text]}"),) if wide else ()),
    )
    room = max(LEAST_TEXT, console.width - BAR_AND_FIGURES)
    with RichProgress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total, completed=done, text="")

        class Bar:
            def advance(self, amount: int = 1, text: str = "") -> None:
                if text:
                    bars.update(task, text=text if len(text) <= room else text[: room - 1] + "…")
                bars.advance(task, amount)

        yield Bar()
