"""The configuration that a run folder holds: for commands on a finished run it does what a recipe does."""

from collections.abc import Sequence
from pathlib import Path

from finetune.config import compose, describe, mistyped, recipes, renamed
from finetune.config.schema import Config
from finetune.config.spelling import setting
from finetune.config.typed_text import Overrides, as_words
from finetune.errors import ConfigError, RunError
from finetune.run import rundir


def of_run(overrides: Overrides, say: compose.Say = compose.LOG) -> Config:
    """What config.yaml says in the run folder that `run_dir`, or else `name`, chooses, with the other overrides.

    The folder may have been moved or renamed since: `run_dir` is where it is now. Raises ConfigError where no run is
    chosen and for wrong overrides, RunError for a damaged config.yaml.
    """
    words = as_words(overrides)
    choice = _of_key("run_dir", words) or _of_key("name", words)
    run_dir = compose.apply(Config(), choice).run_dir if choice else ""
    written = rundir.written_config(Path(run_dir)) if run_dir else {}
    if not written:
        compose.refuse([*mistyped.stray_problems(words), _no_run(run_dir)])
    values = renamed.new_tree(written) | {"run_dir": run_dir}
    try:
        compose.refuse(describe.tree_problems(values))
        config = compose.from_plain(values)
    except ConfigError as error:
        file, reason = Path(run_dir) / rundir.CONFIG, str(error).splitlines()[0]
        raise RunError(f"{file} can't be used ({reason}); name its recipe, such as conf=pixar_style") from error
    return compose.apply(config, [word for word in words if word not in choice], say)


def _of_key(key: str, words: Sequence[str]) -> list[str]:
    return [word for word in words if word.partition("=")[0] == key]


def _no_run(run_dir: str) -> str:
    """What to say, and to type, where there is no config.yaml."""
    here = f", and {run_dir} holds no run" if run_dir else ""
    trained = sorted(Path("outputs").glob("*/receipts/train.json"), key=lambda file: file.stat().st_mtime)
    example = setting("run_dir", str(trained[-1].parents[1])) if trained else "run_dir=outputs/NAME"
    there = ", ".join(recipes.recipe_files())
    return (
        f"conf= is missing{here}: say which run, such as {example}, or which recipe, such as conf=pixar_style; there "
        f"are: {there}"
    )
