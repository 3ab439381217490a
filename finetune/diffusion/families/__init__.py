"""The families of image models, each a small module; `family` finds one by its name in the configuration."""

from importlib import import_module
from typing import cast

from finetune.config.schema import Family as Name
from finetune.diffusion.families.base import Family


def family(name: Name) -> Family:
    """The module of that family."""
    return cast(Family, import_module(f"{__name__}.{name.name}"))
