"""What is captured is the pass as it is without a capture; on a CPU by stand-ins for what only a GPU has."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.training.cuda_graphs import CudaGraphs


class Noted(torch.autograd.Function):
    """The identity; its passes note whether autocast is on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[tuple[str, bool]]) -> Tensor:
        ctx.seen = seen
        seen.append(("forward", torch.is_autocast_enabled("cpu")))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        ctx.seen.append(("backward", torch.is_autocast_enabled("cpu")))
        return upstream, None


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and graphs that do nothing: work runs when it is captured."""

    @contextmanager
    def nothing(*_: Any, **__: Any) -> Iterator[None]:
        yield

    stream = SimpleNamespace(wait_stream=lambda _: None)
    stand_ins = {
        "stream": nothing, "graph": nothing, "current_stream": lambda: stream, "Stream": lambda: stream,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "graph_pool_handle": lambda: None,
        "get_rng_state": lambda: None, "set_rng_state": lambda _: None, "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 0, "empty_cache": lambda: None,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


def test_backward_passes_are_captured_outside_autocast(captures: None) -> None:
    """As they run without a graph: a function's own backward pass would get other dtypes in it."""
    layer, seen = nn.Linear(4, 4), list[tuple[str, bool]]()
    graphs = CudaGraphs(lambda x: Noted.apply(layer(x), seen).sum(), list(layer.parameters()), 2.0**40)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = graphs({"x": torch.ones(2, 4)})
        loss.backward()
    assert graphs.graphs
    assert set(seen) == {("forward", True), ("backward", False)}


def test_what_cannot_be_captured_is_computed_and_said_once(captures: None, capsys: pytest.CaptureFixture[str]) -> None:
    layer, calls = nn.Linear(4, 4), itertools.count(1)

    def waiting(x: Tensor) -> Tensor:
        if next(calls) == 2:  # the first in a capture
            raise RuntimeError("operation not permitted when stream is capturing")
        total: Tensor = layer(x).sum()
        return total

    graphs = CudaGraphs(waiting, list(layer.parameters()), 2.0**40)
    for _ in range(4):
        assert graphs({"x": torch.ones(2, 4)}) == layer(torch.ones(2, 4)).sum()
    assert not graphs.graphs
    said = capsys.readouterr().err.splitlines()
    reason = "operation not permitted when stream is capturing"
    assert said == [f"train: a step can't be a CUDA graph here ({reason}); training goes on without"]


def test_memory_that_runs_out_in_a_capture_is_for_the_fallbacks(captures: None) -> None:
    layer, calls = nn.Linear(4, 4), itertools.count(1)

    def large(x: Tensor) -> Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        total: Tensor = layer(x).sum()
        return total

    graphs = CudaGraphs(large, list(layer.parameters()), 2.0**40)
    graphs({"x": torch.ones(2, 4)})
    with pytest.raises(torch.OutOfMemoryError):
        graphs({"x": torch.ones(2, 4)})
