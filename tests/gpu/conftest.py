"""The fixtures of the unit tests, for the GPU."""

from pathlib import Path

import pytest

from tests.tiny_models import save_diffusion
from tests.unit.conftest import config, language_config, make_dataset, setting, tiny_language

__all__ = ["config", "language_config", "make_dataset", "setting", "tiny_language"]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every kind of block: what is kept, recomputed and offloaded depends on them."""
    return save_diffusion(tmp_path_factory.mktemp("models") / "whole", whole=True)
