"""What operations on fake tensors give, remembered by the shapes of what they are given.

A model repeats itself: of the thousands of operations in a trace a few hundred differ. torch has such a memory too,
but it looks at each argument for much that a trace never has (symbols, sparse tensors, other devices): without this
one, traces took twice as long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Made:
    """One result. of: the place, among the tensors given, of the one whose storage it shares; None: it has its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    of: int | None


_Results = tuple[bool, tuple[_Made, ...]]  # whether it is one tensor, and what there is


class Shapes:
    """Runs operations on the fakes of `mode`."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.known: dict[Any, _Results | None] = {}

    def run(self, function: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What `function(*args, **kwargs)` gives, made again from shapes where they were met before, and what it is
        known by: function, shapes, and all else that it was given."""
        given: list[Tensor] = []
        key = (function, _key(args, given), _key(tuple(kwargs.items()), given) if kwargs else ())
        found = self.known.get(key)
        if found is None or not all(map(_plain, given)):
            result = function(*args, **kwargs)
            if not function._schema.is_mutable and all(map(_plain, given)):
                self.known[key] = _described(result, given)
            return result, key
        alone, made = found
        results = tuple(self._make(part, given) for part in made)
        return results[0] if alone else results, key

    def _make(self, made: _Made, given: Sequence[Tensor]) -> Tensor:
        storage = None if made.of is None else given[made.of].untyped_storage()
        with torch._C._DisableTorchDispatch():
            empty = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
            if storage is not None:
                empty.set_(storage, made.offset, made.shape, made.stride)
        return FakeTensor(self.mode, empty, CPU)


def _key(value: Any, given: list[Tensor]) -> Any:
    """A value as something that can be looked up, tensors by their shapes; these are added to `given`."""
    if isinstance(value, Tensor):
        given.append(value)
        return value.shape, value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, list | tuple):
        return tuple(_key(part, given) for part in value)
    return type(value), value  # by its type too: 1, 1.0 and True are equal


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is no more than its shape: torch keeps the numbers of some, and that others are conjugates."""
    return isinstance(tensor, FakeTensor) and tensor.constant is None and not (tensor.is_conj() or tensor.is_neg())


def _described(result: Any, given: Sequence[Tensor]) -> _Results | None:
    """What there is to remember of a result; None where that isn't all of it."""
    alone = isinstance(result, Tensor)
    results = (result,) if alone else result
    if not isinstance(results, tuple) or not all(isinstance(tensor, Tensor) and _plain(tensor) for tensor in results):
        return None
    given_storages = [tensor.untyped_storage()._cdata for tensor in given]
    own: set[int] = set()
    made = []
    for tensor in results:
        storage = tensor.untyped_storage()._cdata
        of = given_storages.index(storage) if storage in given_storages else None
        if of is None and storage in own:  # two results in one storage
            return None
        own.add(storage)
        made.append(_Made(tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset(), of))
    return alone, tuple(made)
