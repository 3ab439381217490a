"""Recipes, presets and overrides -> Config. With `store` and `cli` the only file that knows Hydra."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from finetune.config import describe, mistyped, recipes, renamed, spelling, store, typed_text
from finetune.config.schema import Config
from finetune.config.typed_text import Overrides
from finetune.config.validate import check
from finetune.errors import ConfigError

# Hydra wants a search path. It must hold nothing of ours: in a wheel Hydra would find finetune/conf as a folder of
# configs, without what `store.registered` adds.
SEARCH_PATH = "pkg://hydra.conf"
Say = Callable[[str], object]
REFERENCE = r"; ${…} takes the value of another key, and \${…} is a text"
LOG: Say = logging.getLogger(__name__).warning


def load(recipe: str, overrides: Overrides = (), say: Say = LOG) -> Config:
    """The configuration of a recipe, as `conf=RECIPE OVERRIDES…` on the command line gives it.

    say: what reports keys under old names. Raises ConfigError, one line a problem, for whatever is wrong with names,
    keys and types, and for settings of another kind of model.
    """
    with store.registered():
        words = judged([spelling.override(recipes.GROUP, recipe), *typed_text.as_words(overrides)], say)
        return resolve(_composed(words), words)


def apply(config: Config, overrides: Overrides, say: Say = LOG) -> Config:
    """A copy of `config` with `key=value` overrides. Presets (`lora=r32`) need a recipe: use `load`."""
    judge, words = _Judge(), typed_text.as_words(overrides)
    good = judge.overrides(words)
    for group, names in judge.chosen.items():
        chooses = "chooses a preset, which needs a recipe: conf=…, or finetune.load"
        judge.problems += [f"{group}={name} {chooses}" for name, _ in names]
    judge.report(say)
    with explained():
        tree = _literal_tree(asdict(config))
        for override in good:
            OmegaConf.update(tree, override.key_or_group, override.value())
    return resolve(tree, words)


def from_plain(values: Mapping[str, Any]) -> Config:
    """The configuration with these values, such as `describe.as_dict` gives; defaults for the others."""
    with explained():
        return _typed(_literal_tree(values))


def _literal_tree(values: Mapping[str, Any]) -> DictConfig:
    """Resolved values once more as a typed tree; a `${…}` that they hold is no reference, but for the default's."""
    literal = spelling.literal(values)
    if values.get("run_dir") == Config.run_dir:
        literal["run_dir"] = Config.run_dir
    return cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), literal))


def resolve(tree: DictConfig, words: Iterable[str]) -> Config:
    """The typed configuration of a composed tree; the CLI and Python meet here. words: the overrides in it.

    Raises ConfigError for what is not set, and for settings among `words` that another kind of model has.
    """
    config = _typed(tree)
    if foreign := _foreign(words, config.model.kind):
        refuse([*foreign, *check(config)])
    return config


def _typed(tree: DictConfig) -> Config:
    with explained():
        missing = sorted(OmegaConf.missing_keys(tree) - {recipes.GROUP})
        refuse([f"{key} is not set; type {key}=…" for key in missing])
        typed = OmegaConf.merge(OmegaConf.structured(Config), tree)
        for key in typed_text.PATHS:
            OmegaConf.update(typed, key, spelling.literal(typed_text.at_home(key, OmegaConf.select(typed, key))))
        return cast(Config, OmegaConf.to_object(typed))


def _foreign(words: Iterable[str], kind: str) -> list[str]:
    return [
        f"{key} is a setting of {owner} models, this recipe trains a {kind} model; leave it out"
        for key in dict.fromkeys(renamed.new_key(word.partition("=")[0].lstrip("+")) for word in words)
        if (owner := describe.kind_of(key)) not in (None, kind)
    ]


def refuse(found: Sequence[str]) -> None:
    """Raise ConfigError with one line a problem, if there is any."""
    if found:
        raise ConfigError("\n".join(dict.fromkeys(found)))


@contextmanager
def explained() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise, once our own checks have passed, into a ConfigError of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = str(error.__cause__).splitlines()[0] if isinstance(error.__cause__, OmegaConfBaseException) else ""
        said = ": ".join(filter(None, [lines[0].rstrip(":") if lines else "", cause]))
        raise ConfigError(said + (REFERENCE if isinstance(error, InterpolationKeyError) else "")) from error


def _composed(words: Sequence[str]) -> DictConfig:
    """Whoever uses Hydra around us (an application, a notebook) finds theirs again."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with explained(), initialize(version_base="1.3", config_path=SEARCH_PATH, job_name="finetune"):
            return compose("config", overrides=list(words))
    finally:
        GlobalHydra.instance().hydra = outer


def job_overrides() -> list[str]:
    """The overrides of the job that Hydra runs, as they were typed: a `${…}` in them is not resolved here."""
    return cast(list[str], OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))


def job_folder() -> str:
    """The folder of the job that Hydra runs; of one in a sweep its run folder."""
    return str(HydraConfig.get().runtime.output_dir)


def name_sweep_folders(overrides: Sequence[str]) -> None:
    """Teach Hydra the folder of each job of a sweep.

    Two jobs then share a folder only if they are the same job, in this sweep or a later one; the second continues the
    first.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    OmegaConf.register_new_resolver("sweep_folder", lambda words: _sweep_folder(words, swept), replace=True)


def _sweep_folder(words: Sequence[str], swept: set[str]) -> str:
    parsed = OverridesParser.create().parse_overrides(list(words))
    recipe = next(_plain(override.value()) for override in parsed if override.key_or_group == recipes.GROUP)
    return recipes.sweep_folder(recipe, [_one_spelling(override) for override in parsed], swept)


def _one_spelling(override: Override) -> str:
    """The same word for the same texts, with quotes or without; numbers stay as they were typed."""
    value, word = _plain(override.value()), str(override.input_line)
    return spelling.override(word.partition("=")[0], value) if isinstance(value, str | list | dict) else word


def judged(typed: Sequence[str], say: Say, sweep: bool = False) -> list[str]:
    """A command line's settings as Hydra takes them, after a check of names, keys and types in them and in their files.

    Raises ConfigError with everything that is wrong, one line each; then wrong values and settings of another kind of
    model are named too, as far as the rest composes. sweep: several values of one key are allowed (`--multirun`).
    """
    judge = _Judge()
    words = [str(override.input_line) for override in judge.overrides(typed, sweep)]
    if judge.files() and judge.problems and not sweep:
        with suppress(ConfigError):  # it will be named once the rest is fixed
            config = _typed(_composed(words))
            judge.problems += [*_foreign(words, config.model.kind), *check(config)]
    judge.report(say)
    return words


class _Judge:
    """Collects what is wrong with a command line and with the files that it chooses, and the old names in them."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: dict[str, str] = {}  # by old key
        self.presets = recipes.preset_files()
        self.chosen: dict[str, list[tuple[str, str]]] = {}  # group -> names, and the file that chose each, with a colon

    def overrides(self, typed: Sequence[str], sweep: bool = False) -> list[Override]:
        """Those with which nothing is wrong; the files that they choose are checked by `files`."""
        self._names((word.partition("=")[0].lstrip("+") for word in typed), "")
        self.problems += mistyped.stray_problems(typed)
        good = []
        for word in map(typed_text.as_typed, filter(mistyped.is_setting, typed)):
            try:
                override = _parsed(word)
                problem = self._override_problem(override, word, sweep)
            except (HydraException, ValueError, RecursionError):  # the last two of 5,000 digits or brackets
                problem = mistyped.unreadable(word)
            if problem:
                self.problems.append(problem)
                if recipes.names_file(group := word.partition("=")[0]):
                    self.chosen[group] = []  # which of them is meant is open; that none was chosen isn't so
            else:
                good.append(override)
        return good

    def _override_problem(self, override: Override, word: str, sweep: bool) -> str | None:
        if override.is_sweep_override() and not sweep:
            return mistyped.several(word)
        key = override.key_or_group
        if override.is_delete():
            return f"{word} would delete a setting, which is not possible; give it a value: {key}=…"
        if key.startswith(("hydra.", "hydra/")):
            return None
        typed = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
        values = list(map(_plain, typed))
        if key == recipes.GROUP or (key in self.presets and all(isinstance(value, str) for value in values)):
            self.chosen[key] = [(str(value), "") for value in values]
            return None
        if override.is_sweep_override() and not all(map(_stays, typed)):
            return mistyped.unreadable(word)
        found = [describe.key_problem(key), *(describe.value_problem(key, value) for value in values)]
        return next(filter(None, found), None)

    def files(self) -> bool:
        """Check the recipes, and the presets that defaults, recipes and overrides choose; whether nothing is wrong."""
        chosen, self.chosen, before = self.chosen, {}, len(self.problems)
        if recipes.GROUP not in chosen:
            there = ", ".join(recipes.recipe_files())
            self.problems.append(f"conf= is missing: say which recipe, such as conf=pixar_style; there are: {there}")
        self._defaults("", store.read(recipes.conf_dir() / f"{recipes.BASE_NAME}.yaml", "")[0]["defaults"], "", ())
        for name, where in chosen.pop(recipes.GROUP, []):
            self._file(recipes.GROUP, name, where, ())
        for group, names in (self.chosen | chosen).items():
            for name, where in names:
                self._file(group, name, where, ())
        return len(self.problems) == before

    def _file(self, group: str, name: str, where: str, above: tuple[Path, ...]) -> None:
        """A recipe or preset, and what it extends. where: the file that names it, with a colon; above: the way here."""
        files = recipes.recipe_files() if group == recipes.GROUP else self.presets.get(group)
        if files is None:
            self.problems.append(where + recipes.no_such("preset group", group, sorted(self.presets)))
        elif name not in files:
            what = "recipe" if group == recipes.GROUP else f"{group} preset"
            self.problems.append(where + recipes.no_such(what, name, sorted(files)))
        elif files[name] in above:
            self.problems.append(f"{recipes.shown(files[name])} extends itself")
        else:
            (tree, keys), here = store.read(files[name], group), f"{recipes.shown(files[name])}: "
            self._defaults(group, tree.get("defaults", []), here, (*above, files[name]))
            self._names(keys, here)
            settings = {key: value for key, value in tree.items() if key != "defaults"}
            self.problems += [here + problem for problem in describe.tree_problems(settings, store.prefix_of(group))]

    def _defaults(self, group: str, defaults: Sequence[Any], where: str, above: tuple[Path, ...]) -> None:
        if problem := describe.defaults_problem(defaults):
            self.problems.append(where + problem)
            return
        for entry in defaults:
            if isinstance(entry, dict):
                for key, name in entry.items():
                    chosen = key.removeprefix("override ").strip().removeprefix("/").removeprefix("optional ")
                    if chosen == recipes.GROUP and group:
                        self.problems.append(f"{where}a recipe stands alone in defaults: {name}, not {key}: {name}")
                    elif chosen != recipes.GROUP and (group or not chosen.startswith("hydra/")):
                        self.chosen[chosen] = [(name, where)]
            elif group and entry != "_self_":
                self._file(group, str(entry).removeprefix(f"/{group}/"), where, above)

    def _names(self, keys: Iterable[str], where: str) -> None:
        notes, clashes = renamed.judged(keys, where)
        self.notes = notes | self.notes
        self.problems += clashes

    def report(self, say: Say) -> None:
        """Say which names are old; raise ConfigError if anything is wrong."""
        for note in self.notes.values():
            say(note)
        refuse(self.problems)


def _parsed(word: str) -> Override:
    parser = OverridesParser.create()
    try:
        return parser.parse_override(word)
    except HydraException:
        return parser.parse_override(typed_text.literally(word))


def _stays(value: Any) -> bool:
    """Whether a job of a sweep gets this very value: Hydra's functions lose the quotes of texts on the way."""
    try:
        return not isinstance(value, str) or OverridesParser.create().parse_override(f"key={value}").value() == value
    except HydraException:
        return False


def _plain(value: Any) -> Any:
    """Hydra's quoted strings as strings."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return getattr(value, "text", value)
