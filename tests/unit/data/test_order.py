"""The order of training, as properties over many random shapes."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from finetune.data import order


def cases():
    random_ = random.Random(0)
    for number in range(60):
        count = random_.randint(1, 40)
        kinds = random_.randint(1, 5)
        yield pytest.param(
            [random_.randrange(kinds) for _ in range(count)], random_.randint(1, 12), number, id=f"case{number}"
        )


def take(buckets, effective, seed, count, start=0):
    return list(itertools.islice(order.steps(buckets, effective=effective, seed=seed, start=start), count))


@pytest.mark.parametrize(("buckets", "effective", "seed"), list(cases()))
def test_every_example_once_an_epoch_and_every_step_full(buckets, effective, seed):
    epochs = 5
    steps = take(buckets, effective, seed, epochs * len(buckets) // effective + effective + 2)
    assert all(len(step) == effective for step in steps)
    seen = Counter(draw for step in steps for draw in step)
    assert set(seen.values()) <= {1}, "no visit occurs twice"
    whole = take(buckets, effective, seed, epochs * len(buckets) // effective)
    missing = epochs * len(buckets) - sum(len(step) for step in whole)
    assert 0 <= missing < effective, "at most a part of one step waits for the next epoch"
    expected = {(index, epoch) for epoch in range(epochs) for index in range(len(buckets))}
    assert {draw for step in whole for draw in step} <= expected


@pytest.mark.parametrize(("buckets", "effective", "seed"), list(cases()))
def test_a_resumed_run_only_skips(buckets, effective, seed):
    assert take(buckets, effective, seed, 6, start=7) == take(buckets, effective, seed, 13)[7:]


@pytest.mark.parametrize(("buckets", "effective", "seed"), list(cases()))
def test_micro_batches_hold_one_bucket_and_all_examples(buckets, effective, seed):
    for step in take(buckets, effective, seed, 4):
        for micro_batch in range(1, effective + 1):
            parts = order.split(step, lambda draw: buckets[draw[0]], micro_batch)
            assert sorted(itertools.chain(*parts)) == sorted(step)
            assert all(len(part) <= micro_batch for part in parts)
            assert all(len({buckets[index] for index, _ in part}) == 1 for part in parts)


def test_steps_are_of_one_bucket_where_buckets_are_large_enough():
    buckets = ["tall"] * 16 + ["wide"] * 8
    for step in take(buckets, 4, 3, 12):
        assert len({buckets[index] for index, _ in step}) == 1


def test_epochs_and_seeds_are_shuffled_differently():
    first, second = (tuple(v[0] for v in itertools.chain(*take([0] * 32, 4, 0, 8, start=s))) for s in (0, 8))
    assert sorted(first) == sorted(second) == list(range(32))
    assert first != second != tuple(range(32))
    assert take([0] * 32, 4, 1, 8) != take([0] * 32, 4, 2, 8)


def test_known_order_stays():
    """The order must survive new versions of Python and of this package, or old runs can't be resumed."""
    assert take(["a", "a", "b", "b", "b"], 2, 7, 5) == KNOWN


KNOWN = [[(1, 0), (0, 0)], [(4, 0), (2, 0)], [(2, 1), (4, 1)], [(0, 1), (1, 1)], [(3, 0), (3, 1)]]


@pytest.mark.parametrize(("buckets", "effective"), [([], 4), ([1], 0)])
def test_nothing_to_order_is_refused(buckets, effective):
    with pytest.raises(ValueError, match="at least one example"):
        order.steps(buckets, effective=effective, seed=0)


def test_splitmix64_of_numbers_and_arrays():
    """The first numbers of the published generator from seed 0, whose state grows by its increment."""
    states = [0x9E3779B97F4A7C15 * index % 2**64 for index in range(3)]
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [order.splitmix64(state) for state in states] == published
    assert order.splitmix64(np.array(states, np.uint64)).tolist() == published
    assert order.splitmix64(np.array(states, np.uint64)).dtype == np.uint64
    assert len({order.seed_from(*numbers) for numbers in itertools.product(range(5), repeat=3)}) == 125
    assert order.seed_from(2**70, -1) < 2**63


def test_examples_are_chosen_by_content_and_keep_their_order():
    hashes = [order.splitmix64(number) for number in range(1000)]
    chosen = order.by_content(hashes, 50)
    assert chosen == sorted(chosen)
    assert len(chosen) == 50
    assert {hashes[place] for place in chosen} == set(sorted(hashes)[:50])
    assert 350 < sum(chosen) / 50 < 650, "spread over the set"
    backwards = order.by_content(hashes[::-1], 50)
    assert {hashes[::-1][place] for place in backwards} == {hashes[place] for place in chosen}
    assert order.by_content(hashes[:50], 50) == list(range(50))
