"""How a setting is written: for Hydra's grammar, and for the shell around it.

Whatever the program offers to type goes through `setting` or `shlex.join`: then it can be pasted.
"""

import re
import shlex
from collections.abc import Mapping
from enum import Enum
from typing import Any

PLAIN = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)  # text that Hydra's grammar reads as it stands
WORDS = ("true", "false", "null", "inf", "nan")  # not text, unless in quotes


def setting(key: str, value: Any) -> str:
    """A setting as it is typed in a shell: read there and by Hydra, it is this very value."""
    return shlex.quote(override(key, value))


def override(key: str, value: Any) -> str:
    """A setting as Hydra's grammar writes it: read by Hydra, it is this very value."""
    return f"{key}={written(value)}"


def written(value: Any) -> str:
    """A value as Hydra's grammar writes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(written, value)) + "]"
    text = str(value)
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    return quoted(literal(text))


def literal(value: Any) -> Any:
    """What OmegaConf reads as this very value: `\\${` is `${` there, and backslashes before it come in pairs."""
    if isinstance(value, Mapping):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", lambda found: rf"{found[1] * 2}\${{", value) if type(value) is str else value


def quoted(text: str) -> str:
    """In quotes, where Hydra's grammar takes backslashes in pairs only before a quote or at the end."""
    doubled = re.sub(r'(\\+)(?="|\Z)', lambda found: found[1] * 2, text)
    return '"' + doubled.replace('"', '\\"') + '"'
