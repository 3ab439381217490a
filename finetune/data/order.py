"""The order of training: a pure function of (seed, epoch), so that a resumed run only has to skip.

Every example occurs exactly once per epoch and every step has exactly `effective` examples, whatever the bucket sizes,
the micro-batch or the number of processes.
"""

import hashlib
import heapq
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

Draw = tuple[int, int]  # (index of the example, number of the epoch)
V = TypeVar("V")
UINT64 = 2**64 - 1


def steps(buckets: Sequence[Hashable], *, effective: int, seed: int, start: int = 0) -> Iterator[list[Draw]]:
    """The examples of each optimiser step, without end, from step `start` on.

    buckets: the bucket of each example. Within an epoch each bucket is shuffled and cut into chunks of `effective`;
    what is left of all buckets is pooled behind the rest of earlier epochs and cut as well; what is left of the pool
    waits for the next epoch. Chunks come in shuffled order. Works for fewer examples than `effective`. Raises
    ValueError for no examples or an `effective` below 1.
    """
    if not buckets or effective < 1:
        raise ValueError(f"need at least one example and effective >= 1, got {len(buckets)} and {effective}")
    return itertools.islice(_steps(buckets, effective, seed), start, None)


def split(chunk: Sequence[V], bucket_of: Callable[[V], Hashable], micro_batch: int) -> list[list[V]]:
    """One step's examples as micro-batches, each of one bucket and at most `micro_batch` long."""
    grouped: dict[Hashable, list[V]] = {}
    for draw in chunk:
        grouped.setdefault(bucket_of(draw), []).append(draw)
    return [
        group[first : first + micro_batch] for group in grouped.values() for first in range(0, len(group), micro_batch)
    ]


def by_content(hashes: Sequence[Any], count: int) -> list[int]:
    """Places of at most `count` of these examples, in their order: those of the lowest hashes.

    hashes: of each example's content, evenly spread. What files are called and how they are sorted then decides
    nothing, and further examples push out only a few.
    """
    if len(hashes) <= count:
        return list(range(len(hashes)))
    return sorted(heapq.nsmallest(count, range(len(hashes)), key=hashes.__getitem__))


def seed_from(*numbers: int) -> int:
    """One well-spread 63-bit seed from several numbers."""
    state = 0
    for number in numbers:
        state = splitmix64(state + number)
    return state >> 1


def splitmix64(value: Any) -> Any:
    """The random number, 0 to 2⁶⁴ - 1, that follows from an int, or from each element of a numpy array of uint64.

    It is the same on every machine and in every version of Python and numpy. Source: SplitMix64 (Steele, Lea, Flood
    2014, doi 10.1145/2714064.2660195).
    """
    value = (value + 0x9E3779B97F4A7C15) & UINT64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & UINT64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & UINT64
    return value ^ (value >> 31)


def _steps(buckets: Sequence[Hashable], effective: int, seed: int) -> Iterator[list[Draw]]:
    members: dict[Hashable, list[int]] = {}
    for index, bucket in enumerate(buckets):
        members.setdefault(bucket, []).append(index)
    carried: list[Draw] = []
    for epoch in itertools.count():
        chunks: list[list[Draw]] = []
        leftovers: list[Draw] = []
        for group in members.values():
            shuffled = sorted(group, key=lambda index: _draw(seed, epoch, index))
            whole = len(shuffled) - len(shuffled) % effective
            chunks += [[(index, epoch) for index in shuffled[i : i + effective]] for i in range(0, whole, effective)]
            leftovers += [(index, epoch) for index in shuffled[whole:]]
        pool = carried + sorted(leftovers, key=lambda draw: _draw(seed, epoch, draw[0]))
        whole = len(pool) - len(pool) % effective
        chunks += [pool[i : i + effective] for i in range(0, whole, effective)]
        carried = pool[whole:]
        yield from sorted(chunks, key=lambda chunk: _draw(seed, epoch, "chunk", *chunk[0]))


def _draw(*values: object) -> bytes:
    """A random number as a hash: the same on every machine and in every version of Python, unlike random.shuffle."""
    return hashlib.blake2b("/".join(map(str, values)).encode(), digest_size=8).digest()
