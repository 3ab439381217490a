"""What is typed as `key=value`, in the words that Hydra's grammar takes as they were meant."""

import os
import re
from pathlib import Path

import yaml

from finetune.config import describe, recipes, renamed

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


def hydra_word(word: str) -> str:
    """An override under today's names, with quotes where Hydra's grammar would not take text as it was typed."""
    match = re.fullmatch(r"(\+{0,2})([\w.]+)=(.*)", word, re.DOTALL)
    if not match:
        return word
    plus, old, value = match.groups()
    key, value = renamed.new_key(old), renamed.new_value(old, value)
    if value.startswith("~"):
        value = f'"{at_home(key, value)}"'
    if key == MANY_PATHS and value.startswith("["):
        value = _one_text(value)
    names_file = key == recipes.GROUP or key in recipes.preset_files()

    def quoted(item: re.Match[str]) -> str:
        number = item["number"]
        stays = not number or (re.fullmatch(r"-?\d+", number) and not names_file)
        return item[0] if stays else item[0].replace(number, f'"{number}"')

    if names_file or describe.leaf_types().get(key) in (str, list[str]):
        value = NUMBERS.sub(quoted, f"={value}")[1:]
    return f"{plus}{key}={value}"


def _one_text(value: str) -> str:
    """A list of paths as the one text that stands for it; anything else as it is."""
    try:
        paths = yaml.load(value, yaml.BaseLoader)
    except yaml.YAMLError:
        return value
    return '"' + os.pathsep.join(map(str, paths)).replace('"', '\\"') + '"' if isinstance(paths, list) else value


def unreadable(word: str) -> str:
    if "=" not in word:
        hint = f"conf={word}" if word in recipes.recipe_files() else "lora.rank=32"
        return f"'{word}' is not a setting; settings are written key=value, such as {hint}"
    key, value = word.split("=", 1)
    if value.startswith("["):
        return f'cannot read {word}; a list of texts is quoted twice: \'{key}=["first text","second text"]\''
    quoted = value.strip("'\"").replace('"', '\\"')
    return f"cannot read {word}; text with spaces, commas, colons or brackets is quoted twice: '{key}=\"{quoted}\"'"


def at_home(key: str, value: str) -> str:
    """A value in which `~` stands for the home folder if it is a path."""
    return str(Path(value).expanduser()) if key in PATHS and value.startswith("~") else value
