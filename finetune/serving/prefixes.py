"""Beginnings that several prompts share, such as a long system prompt, are read once.

Keys and values depend on the tokens before them and on the adapter, so both are what they are found by. An adapter's
key is a hash of its content: one that was replaced has another.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from finetune.serving.cache import new_cache

LEAST_TOKENS = 32  # that are worth to be kept; chat templates alone begin all prompts with fewer
MOST_TOKENS = 4096  # that are kept in all
REMEMBERED = 64  # prompts, of which beginnings are compared


@dataclass(frozen=True)
class Prefix:
    """A beginning that was read. layers: keys and values (1, H, tokens, E) of each."""

    adapter: str
    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]

    def cache(self) -> Any:
        """A new cache that goes on from it."""
        cache = new_cache()
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, index)
        return cache


class Prefixes:
    """A beginning is kept once a second prompt has it; those that weren't used the longest go first."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = min(most_tokens, MOST_TOKENS)
        self._kept: list[Prefix] = []  # the last used at the end
        self._prompts: deque[tuple[str, tuple[int, ...]]] = deque(maxlen=REMEMBERED)

    def longest(self, adapter: str, ids: Sequence[int]) -> Prefix | None:
        """The longest beginning of a prompt that is kept; at least one token is left to be read."""
        ids = tuple(ids)
        fitting = [each for each in self._kept if each.adapter == adapter and each.ids == ids[:-1][: len(each.ids)]]
        found = max(fitting, key=lambda each: len(each.ids), default=None)
        if found:
            self._kept.remove(found)
            self._kept.append(found)
        return found

    def note(self, adapter: str, ids: Sequence[int], cache: Any, row: int) -> None:
        """A prompt has been read: it ends where that row of a cache does."""
        ids = tuple(ids)
        shared = max((_common(ids[:-1], each) for key, each in self._prompts if key == adapter), default=0)
        self._prompts.append((adapter, ids[: self.most_tokens]))
        known = self.longest(adapter, ids)
        if shared < LEAST_TOKENS + (len(known.ids) if known else 0):
            return
        first = cache.layers[0].length - len(ids)  # positions in front are empty
        part = (slice(row, row + 1), slice(None), slice(first, first + shared))
        layers = [(each.keys[part].clone(), each.values[part].clone()) for each in cache.layers]
        self._kept.append(Prefix(adapter, ids[:shared], layers))
        while sum(len(each.ids) for each in self._kept) > self.most_tokens:
            self._kept.pop(0)

    def forget(self) -> None:
        """Let go of all."""
        self._kept.clear()
        self._prompts.clear()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
