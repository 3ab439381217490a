"""Rows of many lengths laid side by side in packs of one length, each isolated from its neighbours.

The plan is a pure function of lengths, seed and epoch: every row occurs exactly once per epoch, and a resumed run only
has to skip. Rows are shuffled again each epoch and packed within a window of them, so that the plan streams.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.data.order import splitmix64
from finetune.data.text.tokens import Encoded
from finetune.errors import DataError
from finetune.run.progress import plural

# L token positions of a pack, N rows
WINDOW = 8192  # rows packed together: far more than fit a pack, far fewer than a large set
PADDING = -1  # segment number of padding
PAD_ID = 0  # any id will do: padding is a segment of its own that nothing sees and nothing is trained on


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows side by side in L token positions, the rest padding.

    ids (L,) int64. trained (L,) bool: the token is a target, predicted from the one before; never so at a row's first
    token, so nothing is predicted from a neighbour. positions (L,) int64: from 0 in each row, and in the padding.
    segments (L,) int32: the row's number within the pack, -1 for padding. rows: the indices that `plan` gave.
    """

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]
    positions: NDArray[np.int64]
    segments: NDArray[np.int32]
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Token positions that are not padding."""
        return int((self.segments != PADDING).sum())


@dataclass(frozen=True)
class PackingStats:
    """How full the packs of an epoch are. packs: their number. capacity: their token positions, with padding.

    tokens, trained: positions with a token, and with a trained one.
    """

    packs: int
    capacity: int
    tokens: int
    trained: int

    def __str__(self) -> str:
        tokens, trained = self.tokens / max(1, self.capacity), self.trained / max(1, self.capacity)
        return (
            f"{plural(self.packs, 'pack')}, {tokens:.1%} of token positions hold a token, {trained:.1%} a trained one"
        )


def plan(
    lengths: Sequence[int] | NDArray[np.int64], *, length: int, seed: int, epoch: int, pack: bool = True
) -> Iterator[tuple[int, ...]]:
    """The packs of an epoch as tuples of row indices; best-fit decreasing within each window of shuffled rows.

    pack: False gives each row a pack of its own. Raises DataError for a row of more than `length` or no tokens.
    """
    array = np.asarray(lengths, np.int64)
    if len(array) and not 1 <= array.min() <= array.max() <= length:
        worst = int(np.flatnonzero((array < 1) | (array > length))[0])
        raise DataError(
            f"row {worst} has {array[worst]} tokens, a pack holds 1 to {length}; cut long rows "
            f"(data.long_rows=split) or try data.length={array.max()}"
        )
    order = shuffled(len(array), seed, epoch)
    for first in range(0, len(order), WINDOW):
        window = order[first : first + WINDOW]
        packs = _best_fit(window.tolist(), array[window].tolist(), length) if pack else [(i,) for i in window.tolist()]
        for number in shuffled(len(packs), seed, epoch, first + 1).tolist():
            yield packs[number]


def steps(
    lengths: Sequence[int] | NDArray[np.int64],
    *,
    length: int,
    effective: int,
    seed: int,
    start: int = 0,
    pack: bool = True,
) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    """The packs of each optimiser step, without end, from step `start` on: lists of `effective` (rows, epoch).

    Epochs follow one another without a gap, so every step has exactly `effective` packs. Raises ValueError for no rows.
    """
    if not len(lengths) or effective < 1:
        raise ValueError(f"need at least one row and effective >= 1, got {len(lengths)} and {effective}")
    packs = (
        (rows, epoch)
        for epoch in itertools.count()
        for rows in plan(lengths, length=length, seed=seed, epoch=epoch, pack=pack)
    )
    remaining = itertools.islice(packs, start * effective, None)
    while True:
        yield list(itertools.islice(remaining, effective))


def build(read: Callable[[int], Encoded], rows: Sequence[int], *, length: int) -> Pack:
    """One pack of the rows that `read` gives for these indices. Raises DataError if they don't fit `length` tokens."""
    ids, positions = np.full(length, PAD_ID, np.int64), np.zeros(length, np.int64)
    trained, segments = np.zeros(length, np.bool_), np.full(length, PADDING, np.int32)
    stop = 0
    for number, index in enumerate(rows):
        row = read(index)
        begin, stop = stop, stop + len(row.ids)
        if stop > length:
            raise DataError(f"rows {tuple(rows)} need {stop} tokens or more, a pack holds {length}; plan again")
        ids[begin:stop], trained[begin + 1 : stop] = row.ids, row.trained[1:]
        positions[begin:stop], segments[begin:stop] = np.arange(stop - begin), number
    positions[stop:] = np.arange(length - stop)
    return Pack(ids, trained, positions, segments, tuple(rows))


def packing_stats(
    lengths: Sequence[int] | NDArray[np.int64],
    trained: Sequence[int] | NDArray[np.int64],
    *,
    length: int,
    seed: int,
    pack: bool = True,
) -> PackingStats:
    """How full the packs of the first epoch are. lengths, trained: tokens and trained tokens of each row, (N,)."""
    packs = sum(1 for _ in plan(lengths, length=length, seed=seed, epoch=0, pack=pack))
    return PackingStats(packs, packs * length, int(np.sum(lengths)), int(np.sum(trained)))


def shuffled(count: int, *key: int) -> NDArray[np.int64]:
    """The numbers below `count` in an order that depends on `key` alone: the same in every version of numpy."""
    state = 0
    for value in key:
        state = splitmix64(state ^ value % 2**64)
    numbers: NDArray[np.uint64] = splitmix64(np.arange(count, dtype=np.uint64) ^ np.uint64(state))
    return np.argsort(numbers, kind="stable")


def _best_fit(rows: list[int], lengths: list[int], length: int) -> list[tuple[int, ...]]:
    """Best-fit decreasing: the longest row first, each into the fullest pack that still has room for it."""
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # packs by free positions
    rooms = 0  # bit n: there is a pack with n free positions
    for place in sorted(range(len(rows)), key=lambda place: -lengths[place]):
        need = lengths[place]
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
            packs[pack].append(rows[place])
        else:
            room, pack = length, len(packs)
            packs.append([rows[place]])
        left = room - need
        if left:
            with_room[left].append(pack)
            rooms |= 1 << left
    return [tuple(pack) for pack in packs]
