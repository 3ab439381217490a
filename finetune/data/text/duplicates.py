"""Equal and nearly equal conversations, found by hashes of a few bytes each, so that sets larger than memory fit."""

import hashlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.text.formats import Conversation

# N rows, S hashes in a signature
HASHES = 16
BANDS = 4  # of HASHES / BANDS each: rows that share 80 % of their shingles meet in a band with probability 0.88
ALIKE = 12  # equal hashes of HASHES that make a near-duplicate: about three quarters of shingles shared
SHINGLE = 3  # words and marks in a row that are compared as one
CHUNK = 65_536  # rows compared at once
# A word, one letter of a script without spaces (Japanese, Chinese, Korean), or one mark.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")
# MinHash: S independent hash functions h -> a·h + b (mod 2^64), of which the upper half counts.
_draws = np.random.Generator(np.random.PCG64(20_240_229)).integers(0, 2**63, (2, HASHES), np.uint64)
FACTORS, OFFSETS = _draws[0] * np.uint64(2) + np.uint64(1), _draws[1]
MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))


def group_of(row: Conversation) -> int:
    """A 64-bit number, equal for conversations that are equal but for case and white space."""
    text = "\x1f".join(f"{message.role}\x1e{' '.join(message.content.split())}" for message in row.messages).casefold()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def signature_of(row: Conversation) -> NDArray[np.uint32]:
    """MinHash signature (S,): the share of equal places estimates the share of shingles that two rows have in common.

    System turns don't count: whole sets share them. Source: Broder 1997, "On the resemblance and containment of
    documents".
    """
    text = " ".join(message.content for message in row.messages if message.role != "system").casefold()
    words = list(map(zlib.crc32, map(str.encode, WORD.findall(text))))
    words += [0] * (SHINGLE - len(words))
    array = np.array(words, np.uint64)
    count = len(array) - SHINGLE + 1
    with np.errstate(over="ignore"):
        shingles = np.zeros(count, np.uint64)
        for place in range(SHINGLE):
            shingles += array[place : place + count] * MIX[place]
        shingles ^= shingles >> np.uint64(29)
        least: NDArray[np.uint64] = (FACTORS[:, None] * shingles + OFFSETS[:, None]).min(axis=1)
    return (least >> np.uint64(32)).astype(np.uint32)


def near(few: NDArray[np.uint32], many: NDArray[np.uint32], rows: NDArray[np.int64]) -> int:
    """How many of the rows `few` (N, S) have a near-duplicate among `many[rows]`; memory does not grow with `rows`.

    Each is compared with one row per band and chunk, so that a few may be missed and none is invented.
    """
    found = np.zeros(len(few), np.bool_)
    keys = _bands(few)
    for chunk in _chunks(many, rows):
        bands = _bands(chunk)
        for band in range(BANDS):
            order = np.argsort(bands[:, band], kind="stable")
            open_ = np.flatnonzero(~found)
            at = np.searchsorted(bands[order, band], keys[open_, band])
            candidates = chunk[order[np.minimum(at, len(order) - 1)]]
            found[open_] = (candidates == few[open_]).sum(axis=1) >= ALIKE
    return int(found.sum())


def _bands(signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """A number for each band of each signature: (N, S) -> (N, BANDS)."""
    wide = signatures.reshape(len(signatures), BANDS, HASHES // BANDS).astype(np.uint64)
    with np.errstate(over="ignore"):
        mixed: Any = (wide * FACTORS[: HASHES // BANDS]).sum(axis=2, dtype=np.uint64)
    return np.asarray(mixed, np.uint64)


def _chunks(many: NDArray[np.uint32], rows: NDArray[np.int64]) -> Iterator[NDArray[np.uint32]]:
    for first in range(0, len(rows), CHUNK):
        yield np.asarray(many[rows[first : first + CHUNK]])
