"""Rows over the length: every policy, and what is lost by it."""

import numpy as np
import pytest

from finetune.config.schema import LongRows
from finetune.data.text.tokens import Encoded
from finetune.data.text.truncate import truncate
from finetune.errors import DataError


def encoded(count, trained, start=0):
    return Encoded(np.array([start, *range(100, 99 + count)], np.uint32), np.isin(np.arange(count), list(trained)))


def cut(row, policy, length=4, start_id=0):
    pieces = truncate(row, length=length, policy=policy, start_id=start_id, source="f:3")
    return [(piece.ids.tolist(), piece.trained.astype(int).tolist()) for piece in pieces]


@pytest.mark.parametrize("policy", list(LongRows))
def test_rows_that_fit_are_left_alone(policy):
    row = encoded(4, {2})
    assert truncate(row, length=4, policy=policy, start_id=0, source="f:3") == [row]


def test_the_start_token_stays_with_every_piece():
    row = encoded(8, {2, 6, 7})
    assert cut(row, LongRows.keep_start) == [([0, 100, 101, 102], [0, 0, 1, 0])]
    assert cut(row, LongRows.keep_end) == [([0, 104, 105, 106], [0, 0, 1, 1])]
    assert cut(row, LongRows.split) == [
        ([0, 100, 101, 102], [0, 0, 1, 0]), ([0, 103, 104, 105], [0, 0, 0, 1]), ([0, 106], [0, 1])
    ]  # fmt: skip
    assert cut(row, LongRows.drop) == []


def test_without_a_start_token_the_first_of_a_piece_is_not_trained():
    row = encoded(8, {3, 4, 5}, start=99)
    assert cut(row, LongRows.keep_start) == [([99, 100, 101, 102], [0, 0, 0, 1])]
    assert cut(row, LongRows.keep_end) == [([103, 104, 105, 106], [0, 1, 0, 0])]
    assert cut(row, LongRows.split) == [([99, 100, 101, 102], [0, 0, 0, 1]), ([103, 104, 105, 106], [0, 1, 0, 0])]
    assert cut(row, LongRows.split, start_id=None) == cut(row, LongRows.split)


def test_pieces_without_trained_tokens_are_left_out():
    assert cut(encoded(8, {7}), LongRows.keep_start) == []
    assert cut(encoded(8, {7}), LongRows.split) == [([0, 106], [0, 1])]


def test_refusing_names_the_row_and_what_to_type():
    with pytest.raises(
        DataError, match=r"^f:3: has 8 tokens, 4 fit; allow more \(data.length=8\).*data.long_rows=keep_end"
    ):
        cut(encoded(8, {7}), LongRows.refuse)
    with pytest.raises(ValueError, match="at least 2"):
        cut(encoded(8, {7}), LongRows.refuse, length=1)


@pytest.mark.parametrize("seed", range(20))
def test_splitting_loses_nothing_but_first_tokens(seed):
    draw = np.random.default_rng(seed)
    count, length = int(draw.integers(2, 200)), int(draw.integers(2, 40))
    row = Encoded(draw.integers(1, 1000, count).astype(np.uint32), draw.random(count) < 0.5)
    row.trained[0] = False
    row.ids[0] = 0
    pieces = truncate(row, length=length, policy=LongRows.split, start_id=0, source="f:3")
    assert sum(piece.trained.sum() for piece in pieces) == row.trained.sum()
    assert all(len(piece.ids) <= length and piece.trained.any() and not piece.trained[0] for piece in pieces)
