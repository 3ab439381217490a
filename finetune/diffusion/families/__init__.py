"""The families of image models, each a small module with a `SPEC`; `family` finds one by its name in the configuration.

To add one: a module in this folder, the configuration of its parts in `finetune/architectures/NAME`, and a preset
`conf/model/NAME.yaml`. Nothing heavy is imported before a family is asked for.
"""

import pkgutil
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, cast

from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.diffusion.families.spec import FamilySpec


def names() -> list[str]:
    """What `model.family` may be: the modules of this folder, found without importing them."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name != "spec"]


def problems(name: str) -> list[str]:
    """One line that says why `model.family` can't be that; none if it can."""
    if name in names():
        return []
    near = get_close_matches(name, names(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return [f"model.family must be one of {', '.join(names())}, got {name!r}{hint}"]


def family(name: str) -> "FamilySpec":
    """What sets that family apart. Raises ConfigError for one that there isn't."""
    if wrong := problems(name):
        raise ConfigError(wrong[0])
    return cast("FamilySpec", import_module(f"{__name__}.{name}").SPEC)
