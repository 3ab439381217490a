"""Replies that one model continues together, one token a step; rows join and leave between steps.

B rows, L token positions of the longest row so far, N rows that join, V tokens of the vocabulary, H heads of keys and
values, E channels of a head.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.serving.cache import join, new_cache
from finetune.serving.prefixes import Prefix, Prefixes
from finetune.serving.router import Router


class Batch(Protocol):
    """Rows in a fixed order; those that join come behind the others."""

    def join(self, rows: Sequence[Sequence[int]], adapters: Sequence[str]) -> Tensor:
        """Read new rows. Returns the logits (N, V) of what follows each; see `step` if it raises."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token of every row. Returns the logits (B, V). If it raises, all rows must go: `keep([])`."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay, in this order."""
        ...

    def forget(self) -> None:
        """Let go of what is kept for later rows."""
        ...


class CachedBatch:
    """Keys and values of all rows lie in one cache, in which every row ends at the same place.

    Shorter rows have masked positions in front, as in a batch of `generate` that is padded on the left.
    """

    def __init__(
        self, model: nn.Module, router: Router, device: torch.device, dtype: torch.dtype, most_tokens: int = 0
    ) -> None:
        """dtype: of the arithmetic; anything but fp32 is autocast. most_tokens: of beginnings that are kept."""
        self.model, self.router, self.device, self.dtype = model, router, device, dtype
        self.prefixes = Prefixes(most_tokens)
        self.adapters: list[str] = []
        self._cache: Any = None
        self._mask_BL = torch.zeros(0, 0, dtype=torch.long, device=device)

    def join(self, rows: Sequence[Sequence[int]], adapters: Sequence[str]) -> Tensor:
        """See `Batch`."""
        found = [self._read(*portion) for portion in self._portions(rows, adapters)]
        caches, masks = [cache for _, cache, _ in found], [mask for _, _, mask in found]
        if self.adapters:
            caches, masks = [self._cache, *caches], [self._mask_BL, *masks]
        length = max(mask.shape[1] for mask in masks)
        if len(caches) > 1:
            join(caches[0], caches[1:], length)
        self._cache = caches[0]
        self._mask_BL = torch.cat([_widened(mask, length) for mask in masks])
        self.adapters += adapters
        return torch.cat([logits_NV for logits_NV, _, _ in found])

    def _portions(self, rows: Sequence[Sequence[int]], adapters: Sequence[str]) -> Iterator[tuple[Any, Any, Any]]:
        """Consecutive rows that are read together, with their adapters: those of which no beginning was read before;
        each of the others alone, with that beginning."""
        known = [self.prefixes.longest(adapter, row) for row, adapter in zip(rows, adapters, strict=True)]
        first = 0
        for last, prefix in enumerate(known, 1):
            if prefix or last == len(rows) or known[last]:
                yield rows[first:last], adapters[first:last], prefix
                first = last

    def _read(
        self, rows: Sequence[Sequence[int]], adapters: Sequence[str], prefix: Prefix | None
    ) -> tuple[Tensor, Any, Tensor]:
        """The logits (N, V) behind some rows, their cache and their mask."""
        ids_NL, mask_NL = padded(rows, self.device)
        cache, read = (prefix.cache(), len(prefix.ids)) if prefix else (new_cache(), 0)
        logits_NV = self._forward(ids_NL[:, read:], mask_NL, cache, adapters)
        for row, (ids, adapter) in enumerate(zip(rows, adapters, strict=True)):
            self.prefixes.note(adapter, ids, cache, row)
        return logits_NV, cache, mask_NL

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Batch`."""
        ids_B1 = torch.tensor(tokens, device=self.device)[:, None]
        self._mask_BL = functional.pad(self._mask_BL, (0, 1), value=1)
        return self._forward(ids_B1, self._mask_BL, self._cache, self.adapters)

    def keep(self, rows: Sequence[int]) -> None:
        """See `Batch`."""
        self.adapters = [self.adapters[row] for row in rows]
        if not rows:
            self._cache, self._mask_BL = None, self._mask_BL[:0, :0]
            return
        chosen = torch.tensor(rows, device=self.device)
        mask_BL = self._mask_BL[chosen]
        empty = int(mask_BL.any(0).long().argmax())  # positions in front that no row has any more
        self._mask_BL = mask_BL[:, empty:]
        for layer in self._cache.layers:
            layer.keep(chosen, empty)

    def forget(self) -> None:
        """See `Batch`."""
        self.prefixes.forget()

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any, adapters: Sequence[str]) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        self.router.set(adapters)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            found = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = found.logits[:, -1].float()
        return logits


class RereadBatch:
    """Without a cache: every step reads all rows from their beginning. Slow, and right for any architecture."""

    def __init__(self, model: nn.Module, router: Router, device: torch.device, dtype: torch.dtype, _: int = 0) -> None:
        """See `CachedBatch`."""
        self.model, self.router, self.device, self.dtype = model, router, device, dtype
        self.adapters: list[str] = []
        self._rows: list[list[int]] = []

    def join(self, rows: Sequence[Sequence[int]], adapters: Sequence[str]) -> Tensor:
        """See `Batch`."""
        logits_NV = self._read(rows, adapters)
        self._rows += [list(row) for row in rows]
        self.adapters += adapters
        return logits_NV

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Batch`."""
        for row, token in zip(self._rows, tokens, strict=True):
            row.append(token)
        return self._read(self._rows, self.adapters)

    def keep(self, rows: Sequence[int]) -> None:
        """See `Batch`."""
        self._rows = [self._rows[row] for row in rows]
        self.adapters = [self.adapters[row] for row in rows]

    def forget(self) -> None:
        """See `Batch`."""

    def _read(self, rows: Sequence[Sequence[int]], adapters: Sequence[str]) -> Tensor:
        """One by one: some architectures know no padding."""
        found = []
        for row, adapter in zip(rows, adapters, strict=True):
            self.router.set([adapter])
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
                ids_1L = torch.tensor([row], device=self.device)
                found.append(self.model(input_ids=ids_1L, use_cache=False, logits_to_keep=1).logits[0, -1].float())
        return torch.stack(found)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask (N, L) of rows that all end at the same place."""
    length = max(map(len, rows))
    ids_NL = torch.zeros(len(rows), length, dtype=torch.long)
    mask_NL = torch.zeros_like(ids_NL)
    for index, row in enumerate(rows):
        ids_NL[index, length - len(row) :] = torch.tensor(row)
        mask_NL[index, length - len(row) :] = 1
    return ids_NL.to(device), mask_NL.to(device)


def _widened(mask_BL: Tensor, length: int) -> Tensor:
    return functional.pad(mask_BL, (length - mask_BL.shape[1], 0))
