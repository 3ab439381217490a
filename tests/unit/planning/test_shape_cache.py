"""Results put together from shapes are those that torch itself gives, where shapes are all there is to know."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.planning.shape_cache import Shapes


class Asking(TorchDispatchMode):
    """Every operation through `Shapes`."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.shapes = Shapes(mode)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.shapes.run(function, args, kwargs or {})[0]


def facts(tensors: Any) -> list[tuple[Any, ...]]:
    listed = [tensors] if isinstance(tensors, Tensor) else tensors
    return [(part.shape, part.stride(), part.dtype, part.storage_offset(), part.device.type) for part in listed]


@pytest.mark.parametrize(
    "work",
    [
        lambda matrix: matrix @ matrix.t(),
        lambda matrix: matrix[1:, ::2],
        lambda matrix: matrix.bfloat16() * 2.0,
        lambda matrix: matrix > 1,
        lambda matrix: torch.split(matrix, 3, dim=1),
        lambda matrix: torch.cat([matrix, matrix[:2]]),
        lambda matrix: torch.max(matrix, dim=1),
        lambda matrix: torch.nn.functional.layer_norm(matrix, (8,)),
        lambda matrix: torch.zeros(3, dtype=torch.long),
        lambda matrix: torch.view_as_complex(matrix.view(8, 4, 2)).conj(),
        lambda matrix: matrix.add_(1),
        lambda matrix: torch.mul(matrix, 2, out=matrix),
        lambda matrix: matrix.t_(),
        lambda matrix: torch.native_layer_norm(matrix, [8], None, None, 1e-5),
        lambda matrix: [
            part
            for part in torch.ops.aten.native_layer_norm_backward(
                matrix, matrix, [8], matrix[:, :1], matrix[:, :1], None, None, [True, False, False]
            )
            if part is not None
        ],
        lambda matrix: torch._foreach_add([matrix, matrix[:2]], 1.0),
    ],
)
def test_as_torch_has_it(work: Callable[[Tensor], Any]) -> None:
    with FakeTensorMode() as mode:
        expected = facts(work(torch.empty(8, 8)))
        with Asking(mode):
            for _ in range(3):  # first it is run, then it is known
                assert facts(work(torch.empty(8, 8))) == expected


def test_what_is_known_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the tracer of the next candidate either."""

    def work() -> None:
        with FakeTensorMode() as mode, Asking(mode):
            one = torch.empty(8, 8)
            part = torch.split(one.add_(one @ one), 3)[0]
            assert part.untyped_storage()._cdata == one.untyped_storage()._cdata

    work()
    run: list[Any] = []
    dispatch = FakeTensorMode.dispatch

    def noted(self: FakeTensorMode, function: Any, *others: Any, **named: Any) -> Any:
        run.append(function)
        return dispatch(self, function, *others, **named)

    monkeypatch.setattr(FakeTensorMode, "dispatch", noted)
    work()
    assert set(run) <= {torch.ops.prim.device.default}


def test_numbers_of_other_types_are_told_apart() -> None:
    with FakeTensorMode() as mode, Asking(mode):
        ones = torch.ones(4, dtype=torch.long)
        found = [(ones * number).dtype for number in (1, 1.0, True, 1, 1.0)]
    assert found == [torch.long, torch.float32, torch.long, torch.long, torch.float32]


def test_views_share_a_storage_and_others_have_their_own() -> None:
    with FakeTensorMode() as mode, Asking(mode):
        for _ in range(2):
            matrix = torch.empty(8, 8)
            address = matrix.untyped_storage()._cdata
            assert matrix.t()[2:].untyped_storage()._cdata == address
            assert (matrix + 1).untyped_storage()._cdata != address


def test_numbers_that_torch_remembers_are_not_lost() -> None:
    with FakeTensorMode() as mode, Asking(mode):
        for number in (3, 4):
            assert int(torch.tensor(number) + 1) == number + 1


def test_gradients_are_as_without() -> None:
    def gradient() -> Tensor:
        weight = torch.empty(8, 8, requires_grad=True)
        ((torch.empty(4, 8) @ weight).relu().t() ** 2).sum().backward()
        assert weight.grad is not None
        return weight.grad

    with FakeTensorMode() as mode, Asking(mode):
        assert facts(gradient()) == facts(gradient())
