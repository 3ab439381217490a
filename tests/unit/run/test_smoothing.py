import pytest

from finetune.run.smoothing import new_weight, smoothed


@pytest.mark.parametrize(("steps", "window"), [(1, 1), (10, 1), (20, 2), (200, 20), (5000, 20)])
def test_it_looks_back_a_tenth_of_the_run_and_twenty_steps_at_most(steps: int, window: int) -> None:
    assert new_weight(steps) == pytest.approx(1 / window)


def test_the_first_value_has_no_more_weight_than_its_age_gives_it() -> None:
    values, weight, mean = [10.7, 5.0, 1.0, 0.6], 0.05, 0.0
    for number, value in enumerate(values, 1):
        mean = smoothed(mean, value, number, weight)
    weights = [0.95**age for age in (3, 2, 1, 0)]
    assert mean == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
