"""The fixtures of the unit tests, for the card."""

from tests.unit.conftest import config, make_dataset, tiny_base

__all__ = ["config", "make_dataset", "tiny_base"]
