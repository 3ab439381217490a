"""What the tests of videos have in common."""

from collections.abc import Iterator

import pytest

from finetune.run.progress import taken_warnings


@pytest.fixture(autouse=True)
def _warnings_taken() -> Iterator[None]:
    """A stage that another test runs in this process would put them into its receipt."""
    yield
    taken_warnings()
