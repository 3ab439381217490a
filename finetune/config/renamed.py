"""Keys and values that had another name in 0.1: accepted for one release, with one line that says the new name."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

KEYS = {
    "export.dialects": "export.formats",
    "hardware.card": "hardware.gpu",
    "trainer.checkpointing": "trainer.activation_checkpointing",
    "trainer.fit": "trainer.autotune",
    "trainer.keep": "trainer.keep_checkpoints",
}
VALUES = {"trainer.fit": {"asked": "check"}}  # of old keys


def new_key(key: str) -> str:
    """What a dotted key is called now."""
    return KEYS.get(key, key)


def new_value(key: str, value: Any) -> Any:
    """The value of an old key in today's words; of a text with commas each."""
    words = VALUES.get(key, {})
    return re.sub(r"\w+", lambda word: words.get(word[0], word[0]), value) if isinstance(value, str) else value


def new_tree(tree: Mapping[Any, Any], prefix: str = "") -> dict[Any, Any]:
    """A recipe under today's names; where both names stand, the new one wins. prefix: of keys in a preset (`lora.`)."""
    found = {}
    for name, value in sorted(tree.items(), key=lambda item: f"{prefix}{item[0]}" not in KEYS):  # old ones first
        key = f"{prefix}{name}"
        new = new_tree(value, f"{key}.") if isinstance(value, dict) else new_value(key, value)
        found[new_key(key).removeprefix(prefix) if key in KEYS else name] = new
    return found


def keys_of(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe."""
    for name, value in tree.items():
        yield f"{prefix}{name}"
        yield from keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) else ()


def judged(keys: Iterable[str], where: str) -> tuple[dict[str, str], list[str]]:
    """By old key what to say about it, and a line for each setting under both names. where: a file, with a colon."""
    given, notes, clashes = set(keys), {}, []
    for old, new in KEYS.items():
        if old in given:
            values = "".join(f" ({word} is now {VALUES[old][word]})" for word in VALUES.get(old, ()))
            notes[old] = f"{where}{old} is now called {new}{values}; the old name works in this release only"
        if {old, new} <= given:
            clashes.append(f"{where}{old} and {new} are two names of one setting; leave out {old}")
    return notes, clashes
