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


@dataclass(frozen=True)
class _Results:
    """What an operation gives. parts: of each what is made, or the place, among the tensors given, of the one that it
    is, or None. holder: what holds them; `Tensor` is one part alone, `NoneType` none."""

    holder: type
    parts: tuple[_Made | int | None, ...]


# Of the whole process: a plan traces several candidates of one base, and most of their operations are the same.
_KNOWN: dict[Any, _Results | None] = {}


class Shapes:
    """Runs operations on the fakes of `mode`."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode

    def run(self, function: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What `function(*args, **kwargs)` gives, made again from shapes where they were met before, and what it is
        known by: function, shapes, and all else that it was given."""
        given: list[Tensor] = []
        key = (function, _key(args, given), _key(tuple(kwargs.items()), given) if kwargs else ())
        found = _KNOWN.get(key)
        if found is None or not all(map(_plain, given)):
            before = [_key(tensor, []) for tensor in given] if function._schema.is_mutable else None
            result = function(*args, **kwargs)
            reshaped = before is not None and before != [_key(tensor, []) for tensor in given]
            if not reshaped and all(map(_plain, given)):
                _KNOWN[key] = _described(result, given)
            return result, key
        parts = [self._make(part, given) for part in found.parts]
        return (found.holder(parts) if found.holder in (tuple, list) else parts[0]), key

    def _make(self, made: _Made | int | None, given: Sequence[Tensor]) -> Tensor | None:
        if not isinstance(made, _Made):
            return None if made is None else given[made]
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
    holder = Tensor if isinstance(result, Tensor) else type(result)
    if holder not in (Tensor, tuple, list, type(None)):
        return None
    parts: list[_Made | int | None] = []
    given_storages = [tensor.untyped_storage()._cdata for tensor in given]
    own: set[int] = set()
    for tensor in result if holder in (tuple, list) else (result,):
        if tensor is None:
            parts.append(None)
            continue
        if not isinstance(tensor, Tensor) or not _plain(tensor):
            return None
        if (same := next((place for place, one in enumerate(given) if one is tensor), None)) is not None:
            parts.append(same)
            continue
        storage = tensor.untyped_storage()._cdata
        of = given_storages.index(storage) if storage in given_storages else None
        if of is None and storage in own:  # two results in one storage
            return None
        own.add(storage)
        parts.append(_Made(tensor.shape, tensor.stride(), tensor.dtype, int(tensor.storage_offset()), of))
    return _Results(holder, tuple(parts))
