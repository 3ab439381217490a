"""The configuration's keys, types and meanings, read off the dataclasses: what judges a misspelt key and a wrong value.

Hydra stops at the first problem; this names all of them. It needs neither Hydra nor OmegaConf.
"""

import ast
import inspect
import itertools
import json
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

from finetune.config import other_tools, schema, serve, workstation
from finetune.config.rules import Rule
from finetune.config.schema import Config
from finetune.config.spelling import setting

SHORT_LIKENESS = 0.75  # of a name of few letters, such as `seed`, to a wrong one; else `deepspeed` is like it
MISSING = "???"  # OmegaConf's mark for a value that somebody else must give
# Keys whose type alone doesn't say what to type; in 0.1 checkpointing was true or false.
MEANT = {"trainer.activation_checkpointing": "0 (none), 1 (every block) or n (every n-th block)"}


class _Entry(NamedTuple):
    key: str
    type: Any
    metadata: Mapping[str, Any]
    owner: str  # the dataclass that declares it


@cache
def _entries() -> tuple[_Entry, ...]:
    """Every dotted key, sections included."""

    def walk(cls: type, prefix: str) -> Iterator[_Entry]:
        hints = typing.get_type_hints(cls)
        for entry in fields(cls):
            key, hint = prefix + entry.name, hints[entry.name]
            yield _Entry(key, hint, entry.metadata, cls.__name__)
            if is_dataclass(hint):
                yield from walk(typing.cast(type, hint), f"{key}.")

    return tuple(walk(Config, ""))


@cache
def leaf_types() -> dict[str, Any]:
    """Every dotted key that holds a value -> its type."""
    return {entry.key: entry.type for entry in _entries() if not is_dataclass(entry.type)}


@cache
def sections() -> tuple[str, ...]:
    """The keys that hold other keys: `lora`, `trainer`, …"""
    return tuple(entry.key for entry in _entries() if is_dataclass(entry.type))


@cache
def rules() -> dict[str, Rule]:
    """Every dotted key with a rule for its value."""
    return {entry.key: entry.metadata["rule"] for entry in _entries() if "rule" in entry.metadata}


def kind_of(key: str) -> str | None:
    """The kind of model that alone has this key or section; None for keys of every kind."""
    owned = (entry for entry in _entries() if "kind" in entry.metadata)
    return next((entry.metadata["kind"] for entry in owned if f"{key}.".startswith(f"{entry.key}.")), None)


def meanings() -> dict[str, str]:
    """Every dotted key that holds a value -> the docstring under its field and the rule for its value, in one line."""
    texts = field_texts(schema, serve, workstation)
    leaves = (entry for entry in _entries() if entry.key in leaf_types())
    found = {entry.key: texts[entry.owner, entry.key.rpartition(".")[2]] for entry in leaves}
    return {key: f"{text} Must {rules()[key].meaning}." if key in rules() else text for key, text in found.items()}


def field_texts(*modules: ModuleType) -> dict[tuple[str, str], str]:
    """Class and field -> the docstring under the field, in one line."""
    texts = {}
    bodies = (ast.parse(inspect.getsource(module)).body for module in modules)
    for node in (node for node in itertools.chain(*bodies) if isinstance(node, ast.ClassDef)):
        for statement, below in itertools.pairwise(node.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                texts[node.name, ast.unparse(statement.target)] = " ".join(text.split())
    return texts


def listing(config: Config, width: int) -> str:
    """Every key that this kind of model has: its value, and what it means, in lines of at most `width` characters."""
    texts, lines = meanings(), []
    for key in leaf_types():
        if kind_of(key) in (None, config.model.kind):
            lines += entry_lines(key, as_dict(attrgetter(key)(config)), texts[key], width)
    return "\n".join(lines)


def entry_lines(key: str, value: Any, text: str, width: int) -> list[str]:
    """The lines of one key in a listing."""
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    first = textwrap.shorten(f"{key}={shown}", width, placeholder=" …", break_on_hyphens=False)
    return [first, *textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")]


def key_problem(key: str) -> str | None:
    """Why `key` can't be set, with the nearest key that can; None if it can."""
    if key in sections() or _leaf_of(key) is not None:
        return None
    return f"no key called {key}; {_nearest(key)}"


def in_mapping(key: str) -> bool:
    """Whether `key` is a mapping or an entry of one, whose names are the user's."""
    leaf = _leaf_of(key)
    return leaf is not None and typing.get_origin(leaf_types()[leaf]) is dict


def type_of(key: str) -> Any:
    """The type of a key's value, or of an entry of a list or mapping; None if there is no such key."""
    leaf = _leaf_of(key)
    hint = leaf and leaf_types()[leaf]
    return hint if leaf in (None, key) else typing.get_args(hint)[-1]


def _leaf_of(key: str) -> str | None:
    """The schema's key behind `key`: itself, or the list or mapping that it points into."""
    leaves = leaf_types()
    if key in leaves:
        return key
    return next((leaf for leaf, hint in leaves.items() if key.startswith(f"{leaf}.") and typing.get_origin(hint)), None)


def _nearest(key: str) -> str:
    note = other_tools.NOTES.get(key.rpartition(".")[2])
    if note and not _near_siblings(key):
        return note
    if near := nearest(key):
        return f"did you mean {near}?"
    siblings = _siblings(key).values()
    return f"there are: {', '.join(siblings or [*sections(), 'seed', 'run_dir', 'name'])}"


def nearest(key: str) -> str | None:
    """The key that a wrong one is likest to: in its section, by what other tools call it, by its last or whole name."""
    leaves, name = list(leaf_types()), key.rpartition(".")[2]
    near = _near_siblings(key) or ([other_tools.KEYS[name]] if name in other_tools.KEYS else [])
    near = near or [leaf for leaf in leaves if leaf.rpartition(".")[2] == name]
    if not near and not _siblings(key):
        names = [*leaves, *sections()]
        like = get_close_matches(key, names, n=1, cutoff=SHORT_LIKENESS)
        near = like or [found for found in get_close_matches(key, names) if "." in found]
    return near[0] if near else None


def _near_siblings(key: str) -> list[str]:
    siblings = _siblings(key)
    return [siblings[leaf] for leaf in get_close_matches(key.rpartition(".")[2], siblings, n=1)]


def _siblings(key: str) -> dict[str, str]:
    """The keys of a key's section, by their last names; none for a key without a section."""
    section = key.rpartition(".")[0]
    return {leaf.rpartition(".")[2]: leaf for leaf in leaf_types() if section and leaf.startswith(f"{section}.")}


def value_problem(key: str, value: Any) -> str | None:
    """Why a plain value doesn't fit `key`; None if it does, or if `key` is not a value of its own."""
    hint = leaf_types().get(key)
    if hint is None:
        if key in sections() and not isinstance(value, dict):
            first = next(leaf for leaf in leaf_types() if leaf.startswith(f"{key}."))
            return f"{key} is a section, got {value!r}; set a key in it, such as {first}"
        return None
    if value == MISSING or (isinstance(value, str) and "${" in value) or _fits(hint, value):
        return None
    wanted = MEANT.get(key) or _described(hint)
    item = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
    if note := other_tools.VALUE_NOTES.get(key, {}).get(str(value).lower()):
        return f"{key} must be {wanted}, got {value!r}; {note}"
    near = _nearest_member(key, item, value) if item is not bool else other_tools.TRUTHS.get(str(value).lower())
    if item is not hint and (near or _fits(item, value)):
        return f"{key} must be {wanted}, got {value!r}; try {setting(key, [near or value])}"
    return f"{key} must be {wanted}, got {value!r}" + (f"; did you mean {near}?" if near else "")


def tree_problems(tree: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """Every wrong key and value of a nested mapping, such as a recipe file."""
    found = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        problem = key_problem(key)
        if problem is None and key in sections() and isinstance(value, Mapping):
            found += tree_problems(value, f"{key}.")
        elif problem := problem or value_problem(key, value):
            found.append(problem)
    return found


def _nearest_member(key: str, hint: Any, value: Any) -> str | None:
    if not _is_enum(hint):
        return None
    word = (str(value[0]) if isinstance(value, list) and value else str(value)).lower()
    if meant := other_tools.VALUES.get(key, {}).get(word):
        return meant
    near = get_close_matches(word, hint.__members__, n=1)
    return near[0] if near else None


def defaults_problem(value: Any) -> str | None:
    """Why Hydra can't read a recipe's `defaults`; None if they are names, and `group: name`."""
    entries = value if isinstance(value, list) else [None]
    words = [word for entry in entries for word in ([*entry, *entry.values()] if isinstance(entry, dict) else [entry])]
    # With @ it could set Hydra's own keys.
    if all(isinstance(word, str) and word and "@" not in word for word in words):
        return None
    return "defaults must be a list of recipes and presets, such as [pixar_style, override /lora: r32]"


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(arguments[1], item) for item in value.values())
    if _is_enum(hint):
        return isinstance(value, hint) or str(value) in hint.__members__
    if isinstance(value, bool) or hint is bool:
        return hint is bool and isinstance(value, bool)
    if hint is float and isinstance(value, str | int):
        try:
            value = float(value)
        except (ValueError, OverflowError):  # the latter of a number of 400 digits
            return False
    return isinstance(value, {str: str | int | float, float: int | float, int: int}[hint])


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is list:
        return f"a list, each item {_described(typing.get_args(hint)[0])}, such as [a,b]"
    if _is_enum(hint):
        return f"one of {', '.join(hint.__members__)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, "a mapping")


def as_dict(config: Any) -> Any:
    """A configuration, or any part of it, as plain values (enums by name), ready for YAML or JSON.

    Of a whole `Config`, keys that belong to another kind of model are left out.
    """
    kind = config.model.kind if isinstance(config, Config) else None

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            shown = [entry.name for entry in fields(value) if kind is None or entry.metadata.get("kind", kind) == kind]
            return {name: plain(getattr(value, name)) for name in shown}
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(config)
