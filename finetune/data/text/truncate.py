"""Rows over the length: truncated, split, dropped or refused, as the recipe says."""

from collections.abc import Iterator

import numpy as np

from finetune.config.schema import LongRows
from finetune.data.text.tokens import Encoded
from finetune.errors import DataError


def truncate(row: Encoded, *, length: int, policy: LongRows, start_id: int | None, source: str) -> list[Encoded]:
    """A row as rows of at most `length` tokens; empty if it is left out. Pieces without a trained token are left out.

    start_id: the start token, which each piece gets in front if the row has it. What was lost is the difference in
    trained tokens. Raises DataError under `refuse`, and ValueError for a `length` below 2.
    """
    if length < 2:
        raise ValueError(f"a row needs at least 2 tokens, got length {length}")
    if len(row.ids) <= length:
        return [row]
    if policy is LongRows.refuse:
        raise DataError(
            f"{source}: has {len(row.ids)} tokens, {length} fit; allow more (data.length={len(row.ids)}) or choose "
            "what to do with such rows: data.long_rows=keep_end, keep_start, split or drop"
        )
    if policy is LongRows.drop:
        return []
    return [piece for piece in _pieces(row, length, policy, start_id) if piece.trained.any()]


def _pieces(row: Encoded, length: int, policy: LongRows, start_id: int | None) -> Iterator[Encoded]:
    head = 1 if row.ids[0] == start_id else 0
    room = length - head
    if policy is LongRows.keep_end:
        begins = [len(row.ids) - room]
    elif policy is LongRows.keep_start:
        begins = [head]
    else:
        begins = list(range(head, len(row.ids), room))
    for begin in begins:
        ids = np.concatenate([row.ids[:head], row.ids[begin : begin + room]])
        trained = np.concatenate([row.trained[:head], row.trained[begin : begin + room]])
        trained[:1] = False  # nothing stands before it, so it can't be predicted
        yield Encoded(ids, trained, row.shortened, row.control)
