"""Keys and values of rows that grow together, with which rows can join and leave.

B rows, H heads of keys and values, E channels of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64  # positions that are added at once


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # untyped
    """transformers' layer with room behind the last position: its own copies all that it has in each step.

    buffers: keys and values (B, H, positions with room, E); `keys` and `values` show those that are in use.
    """

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put new positions behind the others, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.length, self.buffers = 0, [part[:, :, :0] for part in (keys, values)]
        end = self.length + keys.shape[2]
        if end > self.buffers[0].shape[2]:
            more = end + ROOM - self.length
            self.buffers = [functional.pad(each[:, :, : self.length], (0, 0, 0, more)) for each in self.buffers]
        for buffer, part in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.length : end] = part
        self.length = end
        self._show()
        return self.keys, self.values

    def keep(self, rows: Tensor, empty: int) -> None:
        """Only these rows, without so many positions in front."""
        self.buffers = [buffer[rows, :, empty:] for buffer in self.buffers]
        self.length -= empty
        self._show()

    def join(self, others: "Sequence[GrowingLayer]", length: int) -> None:
        """The rows of others behind its own, with empty positions in front, `length` in all."""
        parts = zip(*[each._widened(length) for each in (self, *others)], strict=True)
        self.buffers = [torch.cat(part) for part in parts]
        self.length = length
        self._show()

    def _widened(self, length: int) -> list[Tensor]:
        return [functional.pad(part, (0, 0, length - self.length, 0)) for part in (self.keys, self.values)]

    def _show(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


def new_cache() -> Any:
    """Every layer keeps all positions, those with a window too: which of them a row sees is up to the mask."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def join(cache: Any, joining: Sequence[Any], length: int) -> None:
    """Put the rows of others behind those of a cache, `length` positions long; a layer at a time, as all is large."""
    for index, layer in enumerate(cache.layers):
        layer.join([other.layers[index] for other in joining], length)
