"""Packing, by its properties."""

import itertools

import numpy as np
import pytest

from finetune.data.text import packing
from finetune.data.text.tokens import Encoded
from finetune.errors import DataError

LENGTH = 512


def typical(name, count, seed=0):
    draw = np.random.default_rng(seed)
    made = {
        "short answers": draw.gamma(2.0, 40.0, count),
        "log-normal chats": draw.lognormal(4.5, 0.9, count),
        "uniform": draw.uniform(10, LENGTH, count),
        "mixed": np.concatenate([draw.normal(60, 10, count // 2), draw.uniform(100, LENGTH, count - count // 2)]),
    }[name]
    return np.clip(made.astype(np.int64), 2, LENGTH)


def encoded(lengths, seed=0):
    draw = np.random.default_rng(seed)
    rows = []
    for count in lengths:
        trained = draw.random(count) < 0.4
        trained[0] = False
        rows.append(Encoded(draw.integers(5, 99, count).astype(np.uint32), trained))
    return rows


@pytest.mark.parametrize("count", [1, 2, 37, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_once_and_no_pack_over_the_length(count, seed, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 128)
    lengths = typical("uniform", count, seed)
    for epoch in range(2):
        packs = list(packing.plan(lengths, length=LENGTH, seed=seed, epoch=epoch))
        assert sorted(itertools.chain(*packs)) == list(range(count))
        assert all(lengths[list(pack)].sum() <= LENGTH for pack in packs)


@pytest.mark.parametrize("name", ["short answers", "log-normal chats", "uniform", "mixed"])
def test_packs_are_at_least_95_percent_full(name):
    lengths = typical(name, 4000)
    used = packing.packing_stats(lengths, lengths // 2, length=LENGTH, seed=0)
    assert used.tokens / used.capacity >= 0.95
    assert used.tokens == lengths.sum()
    assert used.capacity == used.packs * LENGTH
    assert str(used).startswith(
        f"{used.packs:,} packs, {used.tokens / used.capacity:.1%} of token positions hold a token"
    )
    alone = packing.packing_stats(lengths, lengths // 2, length=LENGTH, seed=0, pack=False)
    assert (alone.packs, alone.tokens) == (4000, used.tokens)


def test_the_plan_depends_on_seed_and_epoch_alone():
    lengths = typical("mixed", 500)

    def plan(seed, epoch):
        return list(packing.plan(lengths, length=LENGTH, seed=seed, epoch=epoch))

    assert plan(1, 0) == plan(1, 0)
    assert len({tuple(plan(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4
    assert packing.shuffled(8, 3, 1).tolist() == [5, 1, 4, 6, 0, 3, 2, 7], "the same on every machine, for ever"


def test_order_is_fair():
    places = np.mean([packing.shuffled(100, seed, 0).argsort() for seed in range(400)], axis=0)
    assert abs(places - 49.5).max() < 8


def test_the_plan_streams():
    lengths = np.full(2_000_000, 100)
    packs = packing.plan(lengths, length=LENGTH, seed=0, epoch=0)
    assert len(next(packs)) == 5


def test_rows_that_fit_no_pack_are_named():
    with pytest.raises(DataError, match=r"row 1 has 600 tokens, a pack holds 1 to 512; .*data.length=600"):
        next(packing.plan([5, 600], length=LENGTH, seed=0, epoch=0))
    with pytest.raises(DataError, match="row 0 has 0 tokens"):
        next(packing.plan([0], length=LENGTH, seed=0, epoch=0))
    assert list(packing.plan([], length=LENGTH, seed=0, epoch=0)) == []
    rows = encoded([300, 300])
    with pytest.raises(DataError, match="need 600 tokens or more, a pack holds 512"):
        packing.build(rows.__getitem__, (0, 1), length=LENGTH)


def test_steps_go_on_over_epochs_and_can_be_resumed():
    lengths = typical("uniform", 50)
    count = len(list(packing.plan(lengths, length=LENGTH, seed=5, epoch=0)))
    whole = list(itertools.islice(packing.steps(lengths, length=LENGTH, effective=4, seed=5), 30))
    assert all(len(step) == 4 for step in whole)
    flat = list(itertools.chain(*whole))
    assert [epoch for _, epoch in flat[: count + 1]] == [0] * count + [1]
    assert sorted(itertools.chain(*(rows for rows, _ in flat[:count]))) == list(range(50))
    resumed = packing.steps(lengths, length=LENGTH, effective=4, seed=5, start=13)
    assert list(itertools.islice(resumed, 17)) == whole[13:]
    with pytest.raises(ValueError, match="need at least one row"):
        next(packing.steps([], length=LENGTH, effective=1, seed=0))


@pytest.mark.parametrize("seed", range(5))
def test_packs_hold_their_rows_and_nothing_else(seed):
    rows = encoded(typical("log-normal chats", 60, seed), seed)
    lengths = [len(row.ids) for row in rows]
    for indices in packing.plan(lengths, length=LENGTH, seed=seed, epoch=0):
        pack = packing.build(rows.__getitem__, indices, length=LENGTH)
        assert pack.rows == indices
        assert [len(item) for item in (pack.ids, pack.trained, pack.positions, pack.segments)] == [LENGTH] * 4
        assert pack.tokens == sum(lengths[index] for index in indices)
        cu_seqlens = [0, *itertools.accumulate(lengths[index] for index in indices)]
        for number, index in enumerate(indices):
            part = slice(cu_seqlens[number], cu_seqlens[number + 1])
            assert pack.ids[part].tolist() == rows[index].ids.tolist()
            assert pack.trained[part].tolist() == rows[index].trained.tolist()
            assert pack.positions[part].tolist() == list(range(lengths[index]))
            assert (pack.segments[part] == number).all()
        rest = slice(pack.tokens, LENGTH)
        assert (pack.segments[rest] == packing.PADDING).all()
        assert not pack.trained[rest].any()
        assert not pack.trained[cu_seqlens[:-1]].any(), "no row's first token is predicted from its neighbour"


def test_a_trained_first_token_is_never_taken_over():
    rows = [Encoded(np.arange(3, dtype=np.uint32), np.ones(3, np.bool_))] * 2
    pack = packing.build(rows.__getitem__, (0, 1), length=7)
    assert pack.trained.tolist() == [False, True, True, False, True, True, False]
    assert pack.positions.tolist() == [0, 1, 2, 0, 1, 2, 0]
