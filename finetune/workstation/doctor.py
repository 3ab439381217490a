"""`finetune doctor`: what is wrong with this machine, what it costs, and the cure."""

import argparse
import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from finetune.workstation import facts, history, linux
from finetune.workstation.checks import judge
from finetune.workstation.flags import Flags
from finetune.workstation.verdicts import Check, Verdict, worst

EXIT_CODES = {Verdict.ok: 0, Verdict.unknown: 0, Verdict.warn: 1, Verdict.bad: 2}
LEAST_S, MOST_S = 1.0, 3600.0
WIDTH = 80  # columns; a narrower terminal gets its own width
PARTS = re.compile(r"(?<=[;:,] )|(?<= && )")  # of a cure: a command to copy stays in one line


def main(words: Sequence[str]) -> int:
    """Print every check; the exit code is 2 if one is bad, else 1 if one warns, else 0. Raises ConfigError."""
    parser = Flags("doctor")
    parser.add_argument("--load", metavar="SECONDS", type=_seconds, default=0.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    checks = doctor(options.load)
    print(json.dumps([as_plain(check) for check in checks], indent=1) if options.json else text(checks))
    return EXIT_CODES[worst(checks)]


def doctor(load_s: float = 0.0) -> list[Check]:
    """Every check of this machine. Nothing is changed, and nothing is written but what torch has code for.

    load_s: with more than 0 also those of a machine at work: so long on the CPU, and so long on each GPU. Its speeds
    are appended to `history.file()`.
    """
    found = facts.read()
    if load_s:
        from finetune.workstation import load

        found |= {"load": load.read(load_s, found), "xids": linux.xids(), "records": history.records()}
        history.add(found)
    return judge(found)


def as_plain(check: Check) -> dict[str, Any]:
    return asdict(check) | {"verdict": check.verdict.name}


def text(checks: Sequence[Check]) -> str:
    """A line a check, and below what isn't well its limit, its cost and its cure."""
    columns = min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
    wide = max(len(check.id) for check in checks)
    lines: list[str] = []
    for check in checks:
        lines += _wrapped(f"{check.verdict.name:<8}{check.id:<{wide + 2}}", check.fact, columns)
        if check.verdict in (Verdict.warn, Verdict.bad):
            for name in ("limit", "cost", "cure"):
                if said := getattr(check, name):
                    more = f" ({check.source})" if name == "limit" and check.source else ""
                    wrapped = _in_parts if name == "cure" else _wrapped
                    lines += wrapped(f"{'':8}{name}: ", f"{said}{more}", columns)
    counts = [f"{sum(check.verdict is verdict for check in checks)} {verdict.name}" for verdict in Verdict]
    return "\n".join([*lines, "", f"{len(checks)} checks: {', '.join(counts)}"])


def _wrapped(head: str, said: str, columns: int) -> list[str]:
    return textwrap.wrap(said, columns, initial_indent=head, subsequent_indent=" " * len(head))


def _in_parts(head: str, said: str, columns: int) -> list[str]:
    lines = [""]
    for part in PARTS.split(said):
        if lines[-1] and len(head) + len((lines[-1] + part).rstrip()) > columns:
            lines.append("")
        lines[-1] += part
    return [f"{head if number == 0 else ' ' * len(head)}{line.rstrip()}" for number, line in enumerate(lines)]


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if LEAST_S <= float(text) <= MOST_S:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not from {LEAST_S:g} to {MOST_S:g} seconds")
