"""JSON of a person's data, in which no object may have a key twice: Python keeps the last value and says nothing."""

import json
import re
from collections.abc import Iterator
from typing import Any

LONGEST_KEY = 60  # characters of a key that a message shows
# Texts are matched without a way back: a long one would take memory for each of its characters.
TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|[{}\[\],:]', re.S)


class KeyTwice(ValueError):
    """An object has a key twice. line: of the second place, counted from 1 in the text."""

    def __init__(self, key: str, line: int, column: int) -> None:
        shown = key if len(key) <= LONGEST_KEY else f'{key[: LONGEST_KEY - 2]}…"'
        super().__init__(f"has the key {shown} twice in one object (column {column}); keep one of them")
        self.line = line


def loads(text: str) -> Any:
    """The one value of a text. Raises ValueError as `json.loads` does, and KeyTwice."""
    try:
        return _DECODER.decode(text)
    except _Twice:
        raise next(_located(text, 0)) from None


def raw_decode(text: str, begin: int) -> tuple[Any, int]:
    """The value that begins there, and where it ends. Raises ValueError as `JSONDecoder.raw_decode` does, and KeyTwice.

    begin: of no white space.
    """
    try:
        return _DECODER.raw_decode(text, begin)
    except _Twice:
        raise next(_located(text, begin)) from None


class _Twice(Exception):
    """Raised while decoding, which doesn't say where it is."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Twice
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Made once: `json.loads` with a hook makes one for each text, which costs more than decoding a short row."""


def _located(text: str, begin: int) -> Iterator[KeyTwice]:
    """Every key behind `begin` that its object has already; up to the end of the first one's object all is JSON."""
    keys: list[set[str]] = []  # of each object or list around the place
    before = ""
    for match in TOKEN.finditer(text, begin):
        token = match.group()
        if token in ("{", "["):
            keys.append(set())
        elif token in ("}", "]"):
            keys.pop()
        elif token == ":":  # behind keys alone
            key, at = json.loads(before), text.rindex(before, begin, match.start())
            if key in keys[-1]:
                yield KeyTwice(before, text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at))
            keys[-1].add(key)
        before = token
