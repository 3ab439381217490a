"""Replies that one model continues together, one token a step; rows join and leave between steps.

B rows, L token positions of the longest row so far, N rows that join, V tokens of the vocabulary, H heads of keys and
values, E channels of a head.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.serving.cache import join, new_cache
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


class CachedBatch:
    """Keys and values of all rows lie in one cache, in which every row ends at the same place.

    Shorter rows have masked positions in front, as in a batch of `generate` that is padded on the left.
    """

    def __init__(self, model: nn.Module, router: Router, device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of the arithmetic; anything but fp32 is autocast."""
        self.model, self.router, self.device, self.dtype = model, router, device, dtype
        self.adapters: list[str] = []
        self._cache: Any = None
        self._mask_BL = torch.zeros(0, 0, dtype=torch.long, device=device)

    def join(self, rows: Sequence[Sequence[int]], adapters: Sequence[str]) -> Tensor:
        """See `Batch`."""
        ids_NL, mask_NL = padded(rows, self.device)
        cache = new_cache()
        logits_NV = self._forward(ids_NL, mask_NL, cache, adapters)
        if self.adapters:
            length = max(self._mask_BL.shape[1], mask_NL.shape[1])
            join(self._cache, cache, length)
            self._mask_BL = torch.cat([_widened(self._mask_BL, length), _widened(mask_NL, length)])
        else:
            self._cache, self._mask_BL = cache, mask_NL
        self.adapters += adapters
        return logits_NV

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

    def __init__(self, model: nn.Module, router: Router, device: torch.device, dtype: torch.dtype) -> None:
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
