"""Replayed passes give what the passes themselves give, over accumulated gradients, several shapes and dropout."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finetune.config.schema import Config, Device, Precision
from finetune.language import tokenize
from finetune.stages.train import train
from finetune.training.cuda_graphs import CudaGraphs
from tests.end_to_end.stored_losses import figures

pytestmark = pytest.mark.gpu
ROOM = 2.0**40


def gradients(graphs: bool, dropout: float) -> list[Tensor]:
    """After six micro-batches of two shapes, two to a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(dropout), nn.Linear(32, 16)).cuda()
    unused = nn.Parameter(torch.zeros(3, device="cuda"))
    parameters = [*model.parameters(), unused]
    captured = CudaGraphs(lambda x: model(x), parameters, ROOM if graphs else 0.0)
    found = []
    for step in range(6):
        for micro_batch in range(2):
            torch.manual_seed(100 * step + micro_batch)
            x = torch.randn(4 + 3 * (step % 2), 16, device="cuda")
            captured({"x": x}).square().sum().backward()
        assert unused.grad is None
        found += [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad(set_to_none=True)
    assert len(captured.graphs) == (2 if graphs else 0)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_the_passes(dropout: float) -> None:
    for replayed, plain in zip(gradients(True, dropout), gradients(False, dropout), strict=True):
        torch.testing.assert_close(replayed, plain)


@pytest.mark.parametrize("room", [True, False])
def test_graphs_go_where_something_else_would_not_fit_beside_them(room: bool) -> None:
    layer, x = nn.Linear(64, 64).cuda(), torch.ones(2, 64, device="cuda")
    captured = CudaGraphs(lambda x: layer(x), list(layer.parameters()), ROOM)
    for _ in range(3):
        captured({"x": x})
    captured.limit = ROOM if room else 0.0
    captured.make_room()
    assert bool(captured.graphs) == room
    torch.testing.assert_close(captured({"x": x}), layer(x))


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [("diffusion", 0.1), ("diffusion", 0.0), ("language", 0.0)],  # fast blocks and layers know no dropout
)
def test_a_run_with_graphs_trains_what_one_without_trains(
    kind: str, dropout: float, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Config = request.getfixturevalue("config" if kind == "diffusion" else "language_config")
    dataset = request.getfixturevalue("make_dataset")() if kind == "diffusion" else tokenize.build(config, None)
    config.hardware.device, config.trainer.precision = Device.cuda, Precision.bf16
    config.lora.dropout, config.trainer.steps, where = dropout, 12, config.run_dir
    made: list[CudaGraphs] = []
    built = CudaGraphs.__init__
    monkeypatch.setattr(CudaGraphs, "__init__", lambda self, *inputs: (made.append(self), built(self, *inputs))[1])
    found = {}
    for fast in (True, False):
        config.trainer.fast, config.run_dir = fast, f"{where}-{fast}"
        torch.cuda.reset_peak_memory_stats()
        train(config, dataset)
        found[fast] = figures(Path(config.run_dir))["loss/step"]
    (graphs,) = made
    assert graphs.graphs
    assert found[True] == pytest.approx(found[False], rel=1e-2)
