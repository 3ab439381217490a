"""What a value of the configuration must be: declared beside its field, read by help, check and error."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

MOST = 10**9  # of a number without a bound of its own: beyond lie slips of the finger, and what overflows
LONGEST_FILE_NAME = 200  # bytes; file systems take 255, of which endings and temporary names need some
LARGEST_SEED = 2**63 - 1  # torch takes 64 bits, in which it counts negative ones too


@dataclass(frozen=True)
class Rule:
    """What a value must do, in words that stand behind "must"; example: what to type instead of the default.

    most: the largest number that is taken.
    """

    words: str
    holds: Callable[[Any], object]
    example: Any = None
    most: float = math.inf

    @property
    def meaning(self) -> str:
        """The words, and the largest number where it is the setting's own."""
        return self.words if self.most >= MOST else f"{self.words}, at most {self.most:,}"


def must(words: str, holds: Callable[[Any], object], example: Any = None) -> dict[str, Any]:
    """The metadata of a field whose value must do something."""
    return {"rule": Rule(words, holds, example)}


def at_least(least: int, example: Any = None, most: int = MOST) -> dict[str, Any]:
    """The metadata of a number with a smallest value, and with a largest one of its own where time or memory is."""
    return {"rule": Rule(f"be at least {least}", lambda value: value >= least, example, most)}


def multiple_of(step: int, most: int) -> dict[str, Any]:
    """The metadata of a number that some other one divides."""
    return {"rule": Rule(f"be a multiple of {step}", lambda value: value >= step and value % step == 0, most=most)}


POSITIVE = {"rule": Rule("be above 0", lambda value: value > 0, most=MOST)}
SEEDS = must(
    "name at least one seed, none beyond 2^63-1",
    lambda numbers: numbers and all(abs(number) <= LARGEST_SEED for number in numbers),
)
BETAS = must("be two numbers in 0 … 1 (1 excluded)", lambda b: len(b) == 2 and all(0 <= x < 1 for x in b))
SHARE = must("be in 0 … 1 (1 excluded)", lambda value: 0 <= value < 1)


def is_file_name(text: str) -> bool:
    """Whether a file or folder of this name lies in plain sight, right below the one that it is put in."""
    short = len(text.encode(errors="surrogatepass")) <= LONGEST_FILE_NAME
    return short and bool(text.strip()) and not text.startswith(".") and not set(text) & set("/\\\0")


def require_all(members: Iterable[Enum], table: Iterable[Enum], name: str) -> None:
    """Raises TypeError, at import, where a table lacks a member of an enum: a new member is an error until it is
    everywhere that must know it."""
    if missing := [member.name for member in members if member not in set(table)]:
        raise TypeError(f"{name} has no entry for {', '.join(missing)}")
