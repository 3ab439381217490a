"""The example recipes and every tiny model train as they did when `tests/stored/losses.json` was written."""

from pathlib import Path

import pytest

from tests.end_to_end.stored_losses import CASES, RECIPES, expected, figures, stored
from tests.end_to_end.stored_runs import RUNS


@pytest.mark.sampled
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in RECIPES else ())
        for name in CASES
        if name not in RUNS  # test_stored_runs.py goes on with those
    ],
)
def test_losses_are_the_stored_ones(name: str, tmp_path: Path) -> None:
    wanted = expected(name)
    (work := tmp_path / "work").mkdir()
    assert figures(CASES[name](work=work)) == wanted


def test_every_case_is_stored() -> None:
    assert list(stored()) == list(CASES)
