"""What Hydra's ConfigStore holds: the schema, and presets and recipes as they are on disk now.

Everything is registered there rather than found on a search path: then a recipe is an option of the group `conf` (so
`conf=a,b` sweeps, shell completion and recipes that extend recipes all work natively), and the `./conf` of the current
folder wins over the package's, presets included.
"""

import io
import os
import threading
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import OmegaConf

from finetune.config import recipes, renamed, typed_text
from finetune.config.schema import Config
from finetune.errors import ConfigError
from finetune.reading import read_text

MODEL, RECOMMENDED = "model", "recommended"  # presets that may say what suits their base in other sections


class _Node(ConfigNode):
    """Shared by the copies that Hydra makes of the whole store for each composition; what it loads it copies anyway."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Node":
        return self


@dataclass
class _Stored:
    """Entries of the ConfigStore, and the files that they were made of: group, name, path and content."""

    files: list[tuple[str, str, Path, str | None]]
    entries: dict[str, Any]


_stored = _Stored([], {})
_lock = threading.RLock()


@contextmanager
def registered() -> Iterator[None]:
    """Inside, Hydra's ConfigStore holds the schema, presets and recipes: `./conf` follows the current folder.

    One thread at a time, because Hydra's state is global. Entries of the same names that an application around us
    stored are put back afterwards. A file that is not readable YAML is left out, and named where it is chosen.
    """
    repo = ConfigStore.instance().repo
    with _lock:
        ours = _entries()
        theirs = {name: repo.pop(name) for name in ours.keys() & repo.keys()}
        try:
            repo.update(ours)
            yield
        finally:
            for name in ours:
                repo.pop(name, None)
            repo.update(theirs)


def _entries() -> dict[str, Any]:
    """What the ConfigStore is to hold; made again only when a file says something else, for it takes its time."""
    paths = [("", recipes.BASE_NAME, recipes.conf_dir() / f"{recipes.BASE_NAME}.yaml")]
    paths += [(recipes.GROUP, name, path) for name, path in recipes.recipe_files().items()]
    paths += [(group, name, path) for group, files in recipes.preset_files().items() for name, path in files.items()]
    files = [(*entry, _content(entry[-1])) for entry in paths]
    if files == _stored.files:
        return _stored.entries
    nodes: list[tuple[str, str, Any]] = [("", "schema", Config)]
    for group, name, path in paths:
        with suppress(ConfigError):
            nodes.append((group, name, read(path, group)[0]))
    store = ConfigStore.instance()
    theirs, store.repo = store.repo, {}
    try:
        for group, name, node in nodes:
            store.store(name, node, group or None, package=None if prefix_of(group) else "_global_")
        _stored.files, _stored.entries = files, _shared(store.repo)
    finally:
        store.repo = theirs
    return _stored.entries


def _shared(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: _shared(entry) if isinstance(entry, dict) else _Node(**vars(entry)) for key, entry in entries.items()}


def _content(path: Path) -> str | None:
    try:
        return read_text(path)
    except (OSError, ValueError):  # `_read` says why
        return None


def read(path: Path, group: str) -> tuple[dict[str, Any], list[str]]:
    """A recipe or preset under today's names, and the dotted keys that it holds as they stand there."""
    try:
        tree, keys = _tree(read_text(path), group)
    except Exception as error:  # a number of 5,000 digits, brackets in brackets, a link to itself, …
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None)
        reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{recipes.shown(path)}{where} is not readable YAML: {reason}") from error
    return ({"name": path.stem} | tree if group == recipes.GROUP else tree), keys


def prefix_of(group: str) -> str:
    """What stands before the keys of a file: a preset holds a section, and that of a model (`_spread`) says more."""
    return "" if group in ("", recipes.GROUP, MODEL) else f"{group}."


@cache
def _tree(text: str, group: str) -> tuple[dict[str, Any], list[str]]:
    """What YAML says; nobody changes it. The sixty files are read for each composition, and seldom differ."""
    prefix = prefix_of(group)
    tree = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    if not isinstance(tree, dict):
        raise yaml.YAMLError("it holds a list, not `key: value` lines")
    written = yaml.load(text, getattr(yaml, "CBaseLoader", yaml.BaseLoader)) if tree else {}  # every value as text
    if group == MODEL:
        tree, written = _spread(tree), _spread(written)
    hint = typing.get_type_hints(Config).get(prefix.rstrip(".")) if prefix else Config
    kept = typed_text.as_written(hint, renamed.new_tree(tree, prefix), renamed.new_tree(written, prefix))
    section = kept if prefix == "data." else kept.get("data")
    if isinstance(section, dict) and isinstance(paths := section.get("file"), list):
        section["file"] = os.pathsep.join(map(str, paths))
    return kept, list(renamed.keys_of(tree, prefix))


def _spread(preset: dict[Any, Any]) -> dict[Any, Any]:
    """A model preset as a recipe has it: its own section, and the settings of others that it recommends."""
    apart = ("defaults", RECOMMENDED)
    own = {key: value for key, value in preset.items() if key not in apart}
    order = {"defaults": preset["defaults"]} if "defaults" in preset else {}
    return {**order, **(preset.get(RECOMMENDED) or {}), MODEL: own}
