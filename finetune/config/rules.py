"""What a value of the configuration must be: declared beside its field, read by help, check and error."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a value must do, in words that stand behind "must"; example: what to type instead of the default."""

    words: str
    holds: Callable[[Any], object]
    example: Any = None


def must(words: str, holds: Callable[[Any], object], example: Any = None) -> dict[str, Any]:
    """The metadata of a field whose value must do something."""
    return {"rule": Rule(words, holds, example)}


def at_least(least: int, example: Any = None) -> dict[str, Any]:
    """The metadata of a number with a smallest value."""
    return must(f"be at least {least}", lambda value: value >= least, example)


POSITIVE = must("be above 0", lambda value: value > 0)
SHARE = must("be in 0 … 1 (1 excluded)", lambda value: 0 <= value < 1)


def is_file_name(text: str) -> bool:
    """Whether a file or folder of this name lies in plain sight, right below the one that it is put in."""
    return bool(text.strip()) and not text.startswith(".") and not set(text) & set("/\\\0")


def require_all(members: Iterable[Enum], table: Iterable[Enum], name: str) -> None:
    """Raises TypeError, at import, where a table lacks a member of an enum: a new member is an error until it is
    everywhere that must know it."""
    if missing := [member.name for member in members if member not in set(table)]:
        raise TypeError(f"{name} has no entry for {', '.join(missing)}")
