"""Ways to damage a file: bytes, and values inside of JSON and safetensors. Each is named and drawn from a seed."""

import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ABSURD_BYTES = 5 << 30  # of a sparse file, which takes nothing on disk: read whole, it is more than a case may take
HEAD_BYTES = 256  # where formats declare sizes
LONG = 100_000  # characters, digits or brackets
NO_FILES = ("pipe", "socket", "zero", "null", "tty")
STRANGE = ("naïve 猫 🏴‍☠️", "\ud800", "a\x00b", "%s {} ${x}", "../../x", "<script>alert(1)</script>", "' \" ` \\")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 1e-320, 1e308, -1e308, 10**30, 2**31, 2**63, float("inf"), float("nan")),
    *("", " ", "x", *STRANGE, "9" * LONG, "x" * LONG, [], {}, [[]], [None], [1, "a"], {"a": 1}, {"": None}),
)
OTHER_TYPES = (
    *(
        b"",
        b"\0",
        b"null",
        b"[]",
        b"{}",
        b"[1, 2]",
        b'"text"',
        b"3",
        b"key: value\n",
        b"a,b\n1,2\n",
        b"\xff\xfe\x00\xd8",
    ),
    *(
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"PK\x03\x04" + bytes(64),
        b"PAR1" + bytes(16) + b"PAR1",
        b"%PDF-1.7\n",
        b"\x1f\x8b",
    ),
    *(
        b"<html></html>",
        b"#!/bin/sh\n",
        b"\x80\x04N.",
        b"\n" * LONG,
        b"[" * LONG,
        b"{" * LONG,
        b"- " * LONG,
        bytes(LONG),
    ),
)


def damage(path: Path, random: Random) -> str:
    """Damage a file in place; says how."""
    ways: list[Callable[[Path, Random], str | None]] = [_whole, _bytes, _bytes, _values, _values, _values]
    for way in random.sample(ways, len(ways)):
        if said := way(path, random):
            return said
    raise AssertionError("bytes can always be damaged")


def _whole(path: Path, random: Random) -> str:
    """Put something else in the file's place."""
    what = random.choice(("other", "other", "other", "gone", "folder", "link", "loop", "sparse", *NO_FILES))
    if what == "sparse":
        os.truncate(path, ABSURD_BYTES)
        return "made 5 GiB long"
    path.unlink()
    if what == "other":
        content = random.choice(OTHER_TYPES)
        path.write_bytes(content)
        return f"made {content[:12]!r} of {len(content)} bytes"
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to("nowhere")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what in NO_FILES:
        no_file(path, what)
    return f"made {what}"


def no_file(path: Path, what: str) -> None:
    """Make one of `NO_FILES`. Nobody writes into the pipe, so that whoever opens it waits."""
    if what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:  # a whole path may be too long
            made.bind(path.name)
    else:
        path.symlink_to(f"/dev/{what}")


def _bytes(path: Path, random: Random) -> str:
    """Change, cut or repeat bytes."""
    data = bytearray(path.read_bytes())
    place = random.randrange(len(data)) if data else 0
    head = random.randrange(min(len(data), HEAD_BYTES)) if data else 0
    what = random.choice(("cut", "cut", "flip", "flip", "zero", "number", "insert", "double", "binary"))
    if what == "cut":
        del data[place:]
    elif what == "flip":
        place = random.choice((place, head))
        for at in range(place, min(len(data), place + random.choice((1, 1, 8)))):
            data[at] ^= 1 << random.randrange(8)
    elif what == "zero":
        data[place : place + 512] = bytes(len(data[place : place + 512]))
    elif what == "number":  # a declared size, if one stands there
        width = random.choice((2, 4, 8))
        data[head : head + width] = random.choice((b"\xff" * width, b"\x7f" + b"\xff" * (width - 1)))
    elif what == "insert":
        data[place:place] = random.choice((b"\xff", b"\x00", b"\r", "\ufeff".encode(), b"\xed\xa0\x80", b'"', b"\n\n"))
    elif what == "double":
        data += bytes(data)
    else:
        data[place:place] = random.randbytes(64)
    path.write_bytes(data)
    return f"{what} at byte {place}"


def _values(path: Path, random: Random) -> str | None:
    """Another value, or none, somewhere inside of JSON, of a line of JSON, or of a safetensors header."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        head, body = data[8 : 8 + length], data[8 + length :]
        if (changed := _changed(head, random)) is None:
            return None
        path.write_bytes(len(changed[0]).to_bytes(8, "little") + changed[0] + body)
        return f"header: {changed[1]}"
    if path.suffix not in (".json", ".jsonl"):
        return None
    lines = data.splitlines(keepends=True) if path.suffix == ".jsonl" else [data]
    at = random.randrange(len(lines)) if lines else 0
    if not lines or (changed := _changed(lines[at], random)) is None:
        return None
    path.write_bytes(b"".join([*lines[:at], changed[0], b"\n", *lines[at + 1 :]]))
    return f"line {at + 1}: {changed[1]}" if len(lines) > 1 else changed[1]


def _changed(text: bytes, random: Random) -> tuple[bytes, str] | None:
    """JSON with one value changed, and which."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return None
    holders = list(_holders(tree, "$"))
    value = random.choice(VALUES)
    if not holders or random.random() < 0.1:
        return _json(value), f"all is {_brief(value)}"
    holder, key, where = random.choice(holders)
    if random.random() < 0.25:
        del holder[key]
        return _json(tree), f"no {where}"
    holder[key] = value
    return _json(tree), f"{where} is {_brief(value)}"


def _holders(tree: Any, where: str) -> Any:
    """Every place of a nested value: what holds it, under which key, and its path."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key, f"{where}.{key}"
        yield from _holders(value, f"{where}.{key}")


def _json(tree: Any) -> bytes:
    """`\\ud800` stays an escape."""
    return json.dumps(tree).encode()


def _brief(value: Any) -> str:
    text = ascii(value) if not isinstance(value, int) or value < 2**64 else "a huge number"
    return text if len(text) < 40 else f"{text[:20]}… of {len(text)}"
