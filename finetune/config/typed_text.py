"""Settings as they are typed on a command line or given in Python -> settings as Hydra's grammar takes them."""

import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import yaml

from finetune import reading
from finetune.config import describe, recipes, renamed, spelling
from finetune.errors import ConfigError

Overrides = str | Sequence[str] | Mapping[str, Any]
"""Settings as Python gives them: `"lora.rank=32"`, several in a list, or key -> value."""
# Values that may begin with the home folder's `~`, which a shell leaves alone behind a `=`.
PATHS = (
    *("run_dir", "data.folder", "data.file", "data.cache", "data.chat_template", "model.base", "model.parts"),
    *("caption.model", "sample.adapter", "lora.start_from"),
)
MANY_PATHS = "data.file"  # takes a list too, kept as one text with the system's path separator between its paths
# Text in quotes, or a whole item that Hydra's grammar takes for a number or a truth value.
NUMBERS = re.compile(
    r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
    r"""|(?<=[=,\[])\s*(?P<number>[+-]?(?:\.?\d[\w.+-]*|inf|nan)|true|false)(?=\s*(?:[,\]]|$))""",
    re.IGNORECASE,
)
# One of several values with a comma behind each; those in quotes stand by themselves.
ITEM = re.compile(r"""\s*("(?:\\.|[^"\\])*"\s*|'(?:\\.|[^'\\])*'\s*|[^,]*),""")
# One of several lists with a comma behind each: what stands between its brackets.
LIST = re.compile(r"""\s*\[((?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^]"'])*)\]\s*,""")
# Hydra's functions of a sweep; of `choice`, what stands between its brackets if there are no others.
SWEEP = re.compile(r"(?:choice|shuffle|sort|range|interval|glob|tag)\((.*)\)", re.DOTALL)
CHOICE = re.compile(r"""choice\(((?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^()"'])+)\)""")
SETTING = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)


def as_words(overrides: Overrides) -> list[str]:
    """Settings as a command line holds them. Raises ConfigError for what is none."""
    if isinstance(overrides, Mapping):
        return [spelling.override(key, value) for key, value in _flat(overrides)]
    if not isinstance(overrides, str):
        words = list(overrides)
        if wrong := [word for word in words if not isinstance(word, str)]:
            raise ConfigError(f"settings are texts such as 'lora.rank=32', got {wrong[0]!r}")
        return words
    parts = overrides.split()
    keys = [match[2] for part in parts if (match := SETTING.fullmatch(part))]
    if len(parts) > 1 and len(keys) == len(parts) and not any(map(describe.key_problem, keys)):
        raise ConfigError(f"one text holds one setting; give a list: {parts!r}")
    return [overrides]


def as_typed(word: str) -> str:
    """An override under today's names, with quotes where Hydra's grammar would not take text as it was typed."""
    match = SETTING.fullmatch(word)
    if not match:
        return word
    plus, old, value = match.groups()
    key, value = renamed.new_key(old), renamed.new_value(old, value)
    if (choice := CHOICE.fullmatch(value)) and len(ITEM.findall(f"{choice[1]},")) > 1:
        value = choice[1]  # is the same, and keeps quotes, which Hydra's functions lose on the way to a job
    if value.startswith("~") and "," not in value:  # several: `literally` takes them apart
        value = spelling.quoted(at_home(key, value))
    if key == MANY_PATHS and value.startswith("["):
        value = _one_text(value)
    names_file = recipes.names_file(key)

    def quoted(item: re.Match[str]) -> str:
        number = item["number"]
        stays = not number or (re.fullmatch(r"-?\d+", number) and not names_file)
        return item[0] if stays else item[0].replace(number, f'"{number}"')

    if names_file or describe.leaf_types().get(key) in (str, list[str]):
        value = NUMBERS.sub(quoted, f"={value}")[1:]
    if describe.in_mapping(key):
        plus = "++"  # Hydra adds an entry only if it is told to
    elif key in describe.leaf_types():
        plus = ""  # which is what somebody who knows Hydra means by + of a key that is there
    return f"{plus}{key}={value}"


def literally(word: str) -> str:
    """Of a text that Hydra's grammar doesn't take (`Mädchen`, `a=b`, `x (1)`), the override with quotes around it; of
    the name of a recipe or preset too. Of several with commas between them, with quotes around each.

    A `${…}` in it keeps its meaning. What begins as the grammar's own is left to it: quotes, lists and functions.
    """
    match = SETTING.fullmatch(word)
    if not match or not (recipes.names_file(match[2]) or describe.type_of(match[2]) is str):
        return word
    plus, key, text = match.groups()
    if text.startswith(("[", "{")) or SWEEP.fullmatch(text):
        return word
    items = [item.strip() for item in ITEM.findall(f"{text},")]
    return f"{plus}{key}=" + ",".join(
        item if not item or item.startswith(('"', "'")) else spelling.quoted(item) for item in items
    )


def at_home(key: str, value: str) -> str:
    """A value in which `~` stands for the home folder if it is a path."""
    return str(reading.at_home(value)) if key in PATHS and value.startswith("~") else value


def as_written(hint: Any, value: Any, written: Any) -> Any:
    """A value of YAML in which text and names stay as written (`2024_05_01`, `off`), whatever YAML takes them for."""
    if isinstance(value, bool | int | float) and isinstance(hint, type) and issubclass(hint, str | Enum):
        return written or value
    item = (typing.get_args(hint) or [None])[-1]
    if isinstance(value, list) and isinstance(written, list):
        return [as_written(item, *pair) for pair in zip(value, written, strict=True)]
    if isinstance(value, dict) and isinstance(written, dict):
        hints = typing.get_type_hints(hint) if is_dataclass(hint) else dict.fromkeys(value, item)
        return {key: as_written(hints.get(key), part, written.get(str(key))) for key, part in value.items()}
    return value


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key in describe.sections():
            yield from _flat(value, f"{key}.")
        elif key == MANY_PATHS and isinstance(value, list | tuple):
            yield key, os.pathsep.join(map(str, value))
        else:
            yield key, value


def _one_text(value: str) -> str:
    """A list of paths as the one text that stands for it; anything else as it is."""
    try:
        paths = yaml.load(value, yaml.BaseLoader)
    except yaml.YAMLError:
        return value
    return spelling.quoted(os.pathsep.join(map(str, paths))) if isinstance(paths, list) else value
