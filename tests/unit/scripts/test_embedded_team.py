"""Training in several processes. A file of its own: each process imports it, so it must import little."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scripts.embedded.fit import Budget, fit
from scripts.embedded.settings import Settings
from scripts.embedded.team import ALONE, Team, together


def train_on_a_part(settings: Settings, team: Team) -> None:
    """Fit a small network on eight numbers a step, of which each process takes its own part."""
    torch.manual_seed(team.rank)  # the leader's start must reach the others
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    steps = iter(range(100))

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        whole = torch.rand(8, 1, generator=torch.Generator().manual_seed(next(steps)))
        return (whole.chunk(team.size)[team.rank],)

    fit(
        model,
        draw,
        lambda x: (model(x) - x.sin()).square().mean(),
        name="part",
        budget=Budget(seconds=1e9, steps=12),
        lr=0.01,
        checkpoint=settings.work / "part.pt",
        seed=1,
        team=team,
    )
    torch.save(model.state_dict(), settings.work / f"trained-{team.rank}.pt")


def test_two_processes_with_half_the_batch_equal_one_with_the_whole(tmp_path: Path) -> None:
    trained = []
    for processes in (1, 2):
        settings = Settings(tmp_path / str(processes), tmp_path, "cpu", tiny=True, processes=processes)
        settings.work.mkdir()
        together(train_on_a_part, settings)
        trained += [torch.load(settings.work / f"trained-{rank}.pt") for rank in range(processes)]
    one, first, second = trained
    for name, weight in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, atol=1e-6, rtol=1e-5)


def failing_phase(settings: Settings, team: Team) -> None:
    if team.rank == 1:
        raise RuntimeError("the second process")


def test_a_failure_in_one_process_ends_all_and_is_raised(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, "cpu", tiny=True, processes=2)
    with pytest.raises(Exception, match="the second process"):
        together(failing_phase, settings)


def test_one_process_alone_averages_nothing() -> None:
    tensor = torch.ones(2)
    ALONE.average_(tensor)
    ALONE.share_(tensor)
    assert tensor.tolist() == [1.0, 1.0]
    assert ALONE.follow(3.0, 4.0) == (3.0, 4.0)
