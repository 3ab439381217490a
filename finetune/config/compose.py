"""Recipes, presets and overrides -> Config. With `cli` the only file that knows Hydra.

Everything is registered in Hydra's ConfigStore rather than found on a search path: then a recipe is an option of the
group `conf` (so `conf=a,b` sweeps, shell completion and recipes that extend recipes all work natively), and the
`./conf` of the current folder wins over the package's, presets included.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from finetune.config import describe, recipes
from finetune.config.schema import Config
from finetune.config.validate import check
from finetune.errors import ConfigError

# Hydra wants a search path. It must hold nothing of ours: in a wheel Hydra would find finetune/conf as a folder of
# configs, without what `register` adds.
SEARCH_PATH = "pkg://hydra.conf"
# Values that may begin with the home folder's `~`, which a shell leaves alone behind a `=`.
PATHS = (
    *("run_dir", "data.folder", "data.file", "data.cache", "data.chat_template", "model.base", "model.parts"),
    *("caption.model", "sample.adapter", "lora.start_from"),
)
LONGEST_FOLDER = 80  # characters of a sweep job's folder; file systems allow 255 bytes


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe, as `conf=RECIPE OVERRIDES…` on the command line gives it.

    Raises ConfigError, one line a problem, for whatever is wrong with names, keys and types.
    """
    words = [f"conf={recipe}", *quoted(overrides)]
    register()
    refuse(problems(words))
    with explained(), _own_hydra():
        return resolve(compose("config", overrides=words))


def apply(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of `config` with `key=value` overrides. Presets (`lora=r32`) need a recipe: use `load`."""
    found, parsed = _parsed(quoted(overrides), sweep=False)
    found += [
        f"{override.input_line} chooses a preset, which needs a recipe; give it to finetune.load"
        for override in parsed
        if override.key_or_group in recipes.preset_files() and isinstance(override.value(), str)
    ]
    refuse(found or [problem for override in parsed if (problem := _override_problem(override))])
    with explained():
        tree = OmegaConf.structured(config)
        for override in parsed:
            OmegaConf.update(tree, override.key_or_group, override.value())
        return resolve(tree)


def resolve(tree: DictConfig) -> Config:
    """The typed configuration of a composed tree; the CLI and Python meet here."""
    with explained():
        missing = sorted(OmegaConf.missing_keys(tree) - {"conf"})
        refuse([f"{key} is not set; type {key}=…" for key in missing])
        typed = OmegaConf.merge(OmegaConf.structured(Config), tree)
        for key in PATHS:
            OmegaConf.update(typed, key, at_home(key, OmegaConf.select(typed, key)))
        return cast(Config, OmegaConf.to_object(typed))


def quoted(words: Sequence[str]) -> list[str]:
    """Overrides as Hydra reads them: its grammar knows no bare `~`, with which a path at home begins."""
    return [
        re.sub(r"^([\w.]+)=(~.*)$", lambda found: f'{found[1]}="{at_home(*found.groups())}"', word) for word in words
    ]


def at_home(key: str, value: str) -> str:
    """A value in which `~` stands for the home folder if it is a path."""
    return str(Path(value).expanduser()) if key in PATHS and value.startswith("~") else value


def refuse(found: Sequence[str]) -> None:
    """Raise ConfigError with one line a problem, if there is any."""
    if found:
        raise ConfigError("\n".join(dict.fromkeys(found)))


def register() -> None:
    """Put the schema, presets and recipes into Hydra's ConfigStore, again: `./conf` follows the current folder.

    Raises ConfigError that names every file that is not readable YAML.
    """
    store = ConfigStore.instance()
    for group in [name for name in store.repo if name != "hydra" and not name.startswith("_")]:
        del store.repo[group]
    unreadable: list[str] = []

    def put(name: str, path: Path, **where: str) -> None:
        try:
            store.store(name=name, node=_read(path, recipe=where.get("group") == "conf"), **where)
        except ConfigError as error:
            unreadable.append(str(error))

    put(recipes.BASE_NAME, recipes.conf_dir() / f"{recipes.BASE_NAME}.yaml")
    store.store(name="schema", node=Config)
    for name, path in recipes.recipe_files().items():
        put(name, path, group="conf", package="_global_")
    for group, files in recipes.preset_files().items():
        for name, path in files.items():
            put(name, path, group=group)
    refuse(unreadable)


def _read(path: Path, recipe: bool) -> DictConfig:
    try:
        tree = _tree(path.read_text(encoding="utf-8"))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{recipes.shown(path)}{where} is not readable YAML: {reason}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{recipes.shown(path)} is not readable YAML: it holds a list, not `key: value` lines")
    if recipe and "name" not in tree:
        tree = tree.copy()
        tree["name"] = path.stem
    return tree


@cache
def _tree(text: str) -> DictConfig | ListConfig:
    """What YAML says; nobody changes it. The sixty files are read for each composition, and seldom differ."""
    return OmegaConf.load(io.StringIO(text))


def name_sweep_folders(overrides: Sequence[str]) -> None:
    """Teach Hydra the folder of each job of a sweep: recipe / swept settings, and a digest of the settings in common.

    Two jobs then share a folder only if they are the same job, in this sweep or a later one; the second continues the
    first.
    """
    _, parsed = _parsed(overrides, sweep=True)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    OmegaConf.register_new_resolver("sweep_folder", lambda words: _sweep_folder(words, swept), replace=True)


def _sweep_folder(words: Sequence[str], swept: set[str]) -> str:
    settings = {key: value for key, _, value in (word.partition("=") for word in words)}
    settings.pop("run_dir", None)
    recipe = settings.pop("conf")
    varied = ",".join(f"{key}={value}" for key, value in sorted(settings.items()) if key in swept) or "all"
    common = "".join(f"{key}={value}\n" for key, value in sorted(settings.items()) if key not in swept)
    safe = re.sub(r"[^\w.=+,-]", "-", varied)[:LONGEST_FOLDER]
    hidden = common if safe == varied else varied + common  # what the readable part doesn't tell
    return f"{recipe}/{safe}" + (f"-{sha256(hidden.encode()).hexdigest()[:8]}" if hidden else "")


@contextmanager
def explained() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise, once our own checks have passed, into a ConfigError of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        own = [problem for path in _user_presets() for problem in _preset_problems(path)]
        refuse(own)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = str(error.__cause__).splitlines()[0] if isinstance(error.__cause__, OmegaConfBaseException) else ""
        raise ConfigError(": ".join(filter(None, [lines[0].rstrip(":") if lines else "", cause]))) from error


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra for one composition; whoever uses Hydra around us (an application, a notebook) finds theirs again."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize(version_base="1.3", config_path=SEARCH_PATH, job_name="finetune"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def problems(overrides: Sequence[str], sweep: bool = False) -> list[str]:
    """Everything wrong with the names, keys and types of a command line and of the recipes it names, one line each.

    Where something is wrong, the settings that can be read are checked for their values too: all is named at once.

    sweep: several values of one key are allowed (`--multirun`).
    """
    found, parsed = _parsed(overrides, sweep)
    chosen = [override for override in parsed if override.key_or_group == "conf"]
    if not chosen:
        listed = ", ".join(recipes.recipe_files())
        found.append(f"conf= is missing: say which recipe, such as conf=pixar_style; there are: {listed}")
    wrong_recipes: list[str] = []
    for override in chosen:
        for name in _values(override):
            wrong_recipes += _recipe_problems(str(name), seen=set())
    found += wrong_recipes
    usable = bool(chosen) and not sweep and not wrong_recipes
    good = [str(override.input_line) for override in chosen]
    for override in parsed:
        if override not in chosen:
            if problem := _override_problem(override):
                found.append(problem)
            else:
                good.append(str(override.input_line))
    if usable and not found:
        return _foreign_keys(parsed, good)
    return found + _value_problems(good) if found and usable else found


def _foreign_keys(parsed: Sequence[Override], words: Sequence[str]) -> list[str]:
    """Settings that the recipe's kind of model doesn't have."""
    belongs = {override.key_or_group: describe.kind_of(override.key_or_group) for override in parsed}
    if not any(belongs.values()):
        return []
    with explained(), _own_hydra():
        kind = resolve(compose("config", overrides=list(words))).model.kind
    return [
        f"{key} is a setting of {owner} models, this recipe trains a {kind} model; leave it out"
        for key, owner in belongs.items()
        if owner not in (None, kind)
    ]


def _value_problems(words: Sequence[str]) -> list[str]:
    try:
        with explained(), _own_hydra():
            return check(resolve(compose("config", overrides=list(words))))
    except ConfigError:  # it will be named once the rest is mended
        return []


def _parsed(overrides: Sequence[str], sweep: bool) -> tuple[list[str], list[Override]]:
    parser = OverridesParser.create()
    found, parsed = [], []
    for word in overrides:
        try:
            override = parser.parse_override(word)
        except HydraException:
            found.append(_unreadable(word))
            continue
        if override.is_sweep_override() and not sweep:
            key, value = word.split("=", 1)
            quoted = value.replace('"', "")
            found.append(
                f"{key} got several values ({value}); if that is one text, quote it twice: '{key}=\"{quoted}\"'; "
                f"a list needs brackets: {key}=[…]; several runs need --multirun"
            )
            continue
        parsed.append(override)
    return found, parsed


def _unreadable(word: str) -> str:
    if "=" not in word:
        hint = f"conf={word}" if word in recipes.recipe_files() else "lora.rank=32"
        return f"'{word}' is not a setting; settings are written key=value, such as {hint}"
    key, value = word.split("=", 1)
    if value.startswith("["):
        return f'cannot read {word}; a list of texts is quoted twice: \'{key}=["first text","second text"]\''
    quoted = value.strip("'\"").replace('"', '\\"')
    return f"cannot read {word}; text with spaces, commas, colons or brackets is quoted twice: '{key}=\"{quoted}\"'"


def _values(override: Override) -> list[Any]:
    if override.is_sweep_override():
        return list(override.sweep_iterator())
    return [override.value()]


def _override_problem(override: Override) -> str | None:
    key = override.key_or_group
    presets = recipes.preset_files()
    if key.startswith(("hydra.", "hydra/")):
        return None
    if override.is_delete():
        return f"{override.input_line} would delete a setting, which is not possible; give it a value: {key}=…"
    if key in presets and all(isinstance(value, str) for value in _values(override)):
        wrong = [str(value) for value in _values(override) if value not in presets[key]]
        return recipes.no_such(f"{key} preset", wrong[0], sorted(presets[key])) if wrong else None
    wrong = [problem for value in _values(override) if (problem := describe.value_problem(key, _plain(value)))]
    return describe.key_problem(key) or next(iter(wrong), None)


def _plain(value: Any) -> Any:
    """Hydra's quoted strings as strings."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return getattr(value, "text", value)


def _recipe_problems(name: str, seen: set[str]) -> list[str]:
    files = recipes.recipe_files()
    if name not in files:
        return [recipes.no_such("recipe", name, sorted(files))]
    if name in seen:
        return [f"{recipes.shown(files[name])} extends itself"]
    tree = cast(dict[str, Any], OmegaConf.to_container(_read(files[name], recipe=True), resolve=False))
    found = []
    for entry in tree.pop("defaults", None) or []:
        if isinstance(entry, str) and entry != "_self_":
            found += _recipe_problems(entry.removeprefix("/conf/"), seen | {name})
        elif isinstance(entry, dict):
            found += [problem for key, preset in entry.items() if (problem := _preset_choice_problem(key, preset))]
    found += describe.tree_problems({key: value for key, value in tree.items() if key != "hydra"})
    where = f"{recipes.shown(files[name])}: "
    return [problem if ".yaml" in problem else where + problem for problem in found]


def _preset_choice_problem(key: str, preset: Any) -> str | None:
    presets = recipes.preset_files()
    group = key.removeprefix("override ").strip().removeprefix("/").removeprefix("optional ")
    if group.startswith("hydra/"):
        return None
    if group not in presets:
        return recipes.no_such("preset group", group, sorted(presets))
    if not isinstance(preset, str) or preset in presets[group]:
        return None
    return recipes.no_such(f"{group} preset", preset, sorted(presets[group]))


def _user_presets() -> list[Path]:
    own = recipes.conf_dir()
    files = [path for group in recipes.preset_files().values() for path in group.values()]
    return [path for path in files if not path.is_relative_to(own)]


def _preset_problems(path: Path) -> list[str]:
    tree = cast(dict[str, Any], OmegaConf.to_container(_read(path, recipe=False), resolve=False))
    if path.parent.name not in describe.sections():
        return []
    return [f"{recipes.shown(path)}: {problem}" for problem in describe.tree_problems({path.parent.name: tree})]
