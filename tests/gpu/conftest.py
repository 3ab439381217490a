"""The fixtures of the unit tests, for the GPU."""

from tests.unit.conftest import config, language_config, make_dataset, setting, tiny_base, tiny_language

__all__ = ["config", "language_config", "make_dataset", "setting", "tiny_base", "tiny_language"]
