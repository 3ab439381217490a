"""The configuration's keys, types and meanings, read off the dataclasses: what judges a misspelt key and a wrong value.

Hydra stops at the first problem; this names all of them. It needs neither Hydra nor OmegaConf.
"""

import ast
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from typing import Any

from finetune.config import schema as declared
from finetune.config.schema import Config

MISSING = "???"  # OmegaConf's mark for a value that somebody else must give
# Keys whose type alone doesn't say what to type; in 0.1 checkpointing was true or false.
MEANT = {"trainer.activation_checkpointing": "0 (none), 1 (every block) or n (every n-th block)"}


@cache
def leaf_types() -> dict[str, Any]:
    """Every dotted key that holds a value -> its type."""
    return dict(_leaves(Config, ""))


def _leaves(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def sections() -> list[str]:
    """The keys that hold other keys: `lora`, `trainer`, …"""
    return [name for name, hint in typing.get_type_hints(Config).items() if is_dataclass(hint)]


def kind_of(key: str) -> str | None:
    """The kind of model that alone has this key or section; None for keys of every kind."""
    kind: type = Config
    for name in key.split("."):
        entry = next((entry for entry in fields(kind) if entry.name == name), None) if is_dataclass(kind) else None
        if entry is None:
            return None
        if "kind" in entry.metadata:
            return str(entry.metadata["kind"])
        kind = typing.get_type_hints(kind)[name]
    return None


def meanings() -> dict[str, str]:
    """Every dotted key -> the docstring under its field, in one line."""
    classes = {
        node.name: node for node in ast.parse(inspect.getsource(declared)).body if isinstance(node, ast.ClassDef)
    }

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, str]]:
        hints, body = typing.get_type_hints(kind), classes[kind.__name__].body
        for statement, below in zip(body, [*body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            name = statement.target.id
            if is_dataclass(hints[name]):
                yield from walk(typing.cast(type, hints[name]), f"{prefix}{name}.")
            elif isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                yield prefix + name, " ".join(str(below.value.value).split())

    return dict(walk(Config, ""))


def listing(config: Config, width: int) -> str:
    """Every key that this kind of model has: its value, and what it means, in lines of at most `width` characters."""
    texts, lines = meanings(), []

    def add(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            key = prefix + name
            if key in sections():
                add(value, f"{key}.")
                continue
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(textwrap.shorten(f"{key}={shown}", width, placeholder=" …", break_on_hyphens=False))
            lines.extend(textwrap.wrap(texts[key], width, initial_indent="    ", subsequent_indent="    "))

    add(as_dict(config), "")
    return "\n".join(lines)


def key_problem(key: str) -> str | None:
    """Why `key` can't be set, with the nearest key that can; None if it can."""
    if key in sections() or _leaf_of(key) is not None:
        return None
    return f"no key called {key}; {_nearest(key)}"


def _leaf_of(key: str) -> str | None:
    """The schema's key behind `key`: itself, or the list or mapping that it points into."""
    leaves = leaf_types()
    if key in leaves:
        return key
    return next((leaf for leaf, hint in leaves.items() if key.startswith(f"{leaf}.") and typing.get_origin(hint)), None)


def _nearest(key: str) -> str:
    leaves = list(leaf_types())
    section, _, name = key.rpartition(".")
    siblings = {leaf.rpartition(".")[2]: leaf for leaf in leaves if section and leaf.startswith(f"{section}.")}
    near = [siblings[leaf] for leaf in get_close_matches(name, siblings, n=1)]
    near = near or [leaf for leaf in leaves if leaf.rpartition(".")[2] == name]
    near = near or ([] if siblings else get_close_matches(key, [*leaves, *sections()], n=1))
    if near:
        return f"did you mean {near[0]}?"
    return f"there are: {', '.join(siblings.values() or [*sections(), 'seed', 'run_dir', 'name'])}"


def value_problem(key: str, value: Any) -> str | None:
    """Why a plain value doesn't fit `key`; None if it does, or if `key` is not a value of its own."""
    hint = leaf_types().get(key)
    if hint is None:
        if key in sections() and not isinstance(value, dict):
            return f"{key} is a section, got {value!r}; set a key in it, such as {_first_key(key)}"
        return None
    if value == MISSING or (isinstance(value, str) and "${" in value) or _fits(hint, value):
        return None
    near = get_close_matches(str(value), [m.name for m in hint], n=1) if _is_enum(hint) else []
    wanted = MEANT.get(key) or _described(hint)
    return f"{key} must be {wanted}, got {value!r}" + (f"; did you mean {near[0]}?" if near else "")


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


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(arguments[1], item) for item in value.values())
    if _is_enum(hint):
        return isinstance(value, hint) or str(value) in hint.__members__
    if hint is str:
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    if hint is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float) or (isinstance(value, str) and _is_number(value))
    return isinstance(value, int)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"a list, each item {_described(arguments[0])}, such as [a,b]"
    if origin is dict:
        return "a mapping"
    if _is_enum(hint):
        return f"one of {', '.join(hint.__members__)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _first_key(section: str) -> str:
    return next(leaf for leaf in leaf_types() if leaf.startswith(f"{section}."))


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values (enums by name), ready for YAML or JSON.

    Of a whole `Config`, keys that belong to another kind of model are left out.
    """

    kind = config.model.kind if isinstance(config, Config) else None

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {
                entry.name: plain(getattr(value, entry.name))
                for entry in fields(value)
                if kind is None or entry.metadata.get("kind", kind) == kind
            }
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return typing.cast(dict[str, Any], plain(config))
