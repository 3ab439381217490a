"""The training loop of the embedded models and its weights, on models of a few numbers."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from scripts.embedded.fit import Budget, Fitted, fit
from scripts.embedded.weights import FlatWeights


class CutError(Exception):
    """Stands for a lost machine."""


def fit_line(
    checkpoint: Path, *, steps: int, cut_at: int | None = None, pause_at: float = math.inf
) -> tuple[Fitted, Tensor]:
    """Fit y = 3x; raise CutError when step `cut_at` is drawn."""
    torch.manual_seed(0)
    model, drawn = nn.Linear(1, 1), iter(range(10_000))

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        if next(drawn) == cut_at:
            raise CutError
        return (torch.rand(8, 1, generator=generator),)

    fitted = fit(
        model,
        draw,
        lambda x: (model(x) - 3 * x).square().mean(),
        name="line",
        budget=Budget(seconds=1e9, steps=steps),
        lr=0.1,
        checkpoint=checkpoint,
        seed=1,
        save_every_s=0.0,
        pause_at=pause_at,
    )
    return fitted, model.weight.detach().clone()


def test_a_cut_and_continued_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, weight = fit_line(tmp_path / "whole.pt", steps=20)
    with pytest.raises(CutError):
        fit_line(tmp_path / "cut.pt", steps=20, cut_at=7)
    continued, same = fit_line(tmp_path / "cut.pt", steps=20)
    assert continued.steps == whole.steps == 20
    assert torch.equal(weight, same)


def test_a_finished_training_called_again_only_loads(tmp_path: Path) -> None:
    _, weight = fit_line(tmp_path / "line.pt", steps=5)
    again, same = fit_line(tmp_path / "line.pt", steps=5, cut_at=0)
    assert again.steps == 5
    assert torch.equal(weight, same)
    assert json.loads((tmp_path / "line.json").read_text())["steps"] == 5


def test_a_budget_is_spent_by_time_or_steps() -> None:
    assert Budget(seconds=10).progress(5, 10_000) == 0.5
    assert Budget(seconds=10, steps=4).progress(1, 4) == 1.0


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="line: loss nan at step 1"):
        fit(
            model,
            lambda generator: (torch.full((1, 1), torch.nan),),
            lambda x: model(x).mean(),
            name="line",
            budget=Budget(seconds=1e9, steps=3),
            lr=0.1,
            checkpoint=tmp_path / "line.pt",
            seed=1,
        )


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_paused_training_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_before: int
) -> None:
    whole, weight = fit_line(tmp_path / "whole.pt", steps=6)
    clock = iter(range(1000))
    monkeypatch.setattr("scripts.embedded.fit.time.time", lambda: next(clock))
    paused, _ = fit_line(tmp_path / "paused.pt", steps=6, pause_at=steps_before)
    assert (whole.done, paused.done, paused.steps) == (True, False, steps_before)
    continued, same = fit_line(tmp_path / "paused.pt", steps=6)
    assert continued.done
    assert torch.equal(weight, same)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "conv.pt"

    def train(memory_format: torch.memory_format) -> None:
        model = nn.Conv2d(2, 3, 3).to(memory_format=memory_format)
        fit(
            model,
            lambda generator: (torch.rand(2, 2, 4, 4, generator=generator),),
            lambda x: model(x).square().mean(),
            name="conv",
            budget=Budget(seconds=1e9, steps=1),
            lr=0.1,
            checkpoint=checkpoint,
            seed=1,
        )

    train(torch.channels_last)
    with pytest.raises(ValueError, match=r"conv\.pt holds weights of another shape or order; remove it"):
        train(torch.contiguous_format)


# --- flat weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_weights_compute_and_release_what_the_model_held(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 5, 1)).to(memory_format=memory_format)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, wanted = torch.rand(2, 3, 6, 6), torch.randn(2, 5, 4, 4)
    (model(images) * wanted).sum().backward()
    gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    weights = FlatWeights(model, dtype)
    (model(images.to(dtype)).float() * wanted).sum().backward()
    weights.collect_gradients()
    assert weights.master_W.grad is not None
    for gradient, flat in zip(gradients, weights.views(weights.master_W.grad), strict=True):
        assert (flat - gradient).norm() <= (0.05 if dtype == torch.bfloat16 else 1e-5) * gradient.norm() + 1e-5
    weights.release(weights.master_W.data)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.stride() == before[name].stride()
    storages = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert len(storages) == len(list(model.parameters()))


def test_a_bf16_training_keeps_steps_that_bf16_would_round_away(tmp_path: Path) -> None:
    """A weight of 1 moves by 1e-4 a step; bf16 alone knows nothing between 1 and 1.0078."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    fit(
        model,
        lambda generator: (torch.ones(1, 1),),
        lambda x: (model(x.to(model.weight.dtype)).float() - 2.0).square().mean(),
        name="line",
        budget=Budget(seconds=1e9, steps=40),
        lr=1e-4 * 200,
        checkpoint=tmp_path / "line.pt",
        seed=1,
        ema_decay=0.0,
        bf16=True,
    )
    assert model.weight.dtype == torch.float32
    assert 1.0 < model.weight.item() < 1.1
    assert model.weight.item() != model.weight.bfloat16().item()


def fit_line_together(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    # The second process never wants to pause, and the first one says when.
    fitted, weight = fit_line(folder / f"{rank}.pt", steps=20, pause_at=math.inf if rank else 0.0)
    assert (fitted.steps, fitted.done) == (0, False)
    fitted, weight = fit_line(folder / f"{rank}.pt", steps=20)
    torch.save((fitted.steps, weight), folder / f"weight-{rank}.pt")


@pytest.mark.exhaustive
def test_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(fit_line_together, (tmp_path,), nprocs=2)
    (steps, weight), (as_many, same) = (torch.load(tmp_path / f"weight-{rank}.pt") for rank in (0, 1))
    assert steps == as_many == 20
    assert torch.equal(weight, same)
    assert not (tmp_path / "1.pt").exists()
    _, alone = fit_line(tmp_path / "alone.pt", steps=20)
    assert not torch.equal(weight, alone)  # each drew examples of its own
