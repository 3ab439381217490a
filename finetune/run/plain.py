"""Records as plain JSON values and back, whatever became of the file in between, and wherever its run folder lies."""

import types
import typing
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any, TypeVar

R = TypeVar("R")

UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What reading a damaged JSON or YAML file as a record may raise; UnicodeDecodeError is a ValueError."""
LARGEST = 2**63
"""Of whole numbers in records; larger ones are no number of anything, and no float."""


def inside(record: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """A record's plain values with its paths in the run folder relative to that. Raises TypeError for other paths."""
    return values | {name: _last(values[name], parts) for name, parts in _paths(record, values)}


def placed(record: type[Any], values: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The inverse of `inside` for a run folder that lies here now; earlier versions wrote whole paths."""
    return values | {name: str(run_dir / _last(values[name], parts)) for name, parts in _paths(record, values)}


def _paths(record: type[Any], values: dict[str, Any]) -> list[tuple[str, int]]:
    """Fields with a path in the run folder that is not empty, and how many of its parts are below that."""
    table: dict[str, int] = getattr(record, "INSIDE", {})
    return [(name, parts) for name, parts in table.items() if values.get(name)]


def _last(path: Any, parts: int) -> str:
    found = PurePath(path).parts[-parts:] if parts else ()
    if len(found) != parts or not all(map(_is_plain, found)):
        raise TypeError(f"{path} is no path in a run folder")
    return PurePath(*found).as_posix()


def first_line(error: Exception) -> str:
    """What an error says, in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"


def require_duration(seconds: float) -> None:
    """Raises ValueError for seconds that no clock measures."""
    if not 0 <= seconds < LARGEST:
        raise ValueError(f"{seconds} is no number of seconds")


def require_names(*names: str) -> None:
    """Raises ValueError unless each is the name of a file right in its folder."""
    for name in names:
        if not _is_plain(name):
            raise ValueError(f"{_short(name)} is no file name")


def _is_plain(name: str) -> bool:
    """Whether a part of a path leads further down, and nowhere else."""
    return name not in ("", "..") and name == PurePath(name).name


def from_plain(kind: type[R], data: Any) -> R:
    """The inverse of `dataclasses.asdict` for frozen records; fields that have gone are passed over.

    Raises TypeError where a field without a default is missing, or a value is not of its field's type.
    """
    if not isinstance(data, dict):
        raise TypeError(f"{kind.__name__} is no object but {_short(data)}")
    hints, renamed = _hints(typing.cast(Any, kind)), getattr(kind, "RENAMED", {})
    data = {renamed.get(name, name): value for name, value in data.items()}
    return kind(**{f.name: _convert(hints[f.name], data[f.name], f.name) for f in fields(kind) if f.name in data})  # type: ignore[arg-type]


@cache  # an index has a line for each example
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _convert(hint: Any, value: Any, name: str) -> Any:
    """A JSON value as a field's type. Raises TypeError, with the field's name, if it is of another one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if any(_is_a(argument, value) for argument in arguments if not typing.get_origin(argument)):
            return value
        hint = next((argument for argument in arguments if typing.get_origin(argument) or is_dataclass(argument)), hint)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list | tuple):
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) == len(value):
            return tuple(_convert(each, item, name) for each, item in zip(inner, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if is_dataclass(hint):
        return from_plain(typing.cast(type[Any], hint), value)
    if origin is None and _is_a(hint, value):
        return value
    raise TypeError(f"{name} can't be {_short(value)}")


def _is_a(hint: Any, value: Any) -> bool:
    if hint in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < LARGEST
    if hint is str and isinstance(value, str):
        value.encode()  # half a surrogate, which no file takes, is a ValueError
    return isinstance(value, hint)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"
