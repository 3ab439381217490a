"""The families of image models, each a small module; `family` finds one by its name in the configuration."""

from importlib import import_module
from typing import cast

from finetune.config.schema import Family as Name
from finetune.diffusion.families.spec import FamilySpec


def family(name: Name) -> FamilySpec:
    """What sets that family apart."""
    return cast(FamilySpec, import_module(f"{__name__}.{name.name}").SPEC)
