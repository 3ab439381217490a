"""Half of what a launcher says is a line to read, whatever command it stands before."""

import os

import pytest
import torch

from finetune.config.schema import Precision
from finetune.errors import ConfigError
from finetune.run import ranks
from finetune.training.accelerator import build_accelerator

WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*WHOLE, *ranks.MPI, *ranks.PLUGINS):
        monkeypatch.delenv(name, raising=False)


def surround(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("lacking", [name for name in WHOLE if name != "WORLD_SIZE"])
def test_a_variable_that_a_launcher_sets_and_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    surround(monkeypatch, {name: value for name, value in WHOLE.items() if name != lacking})
    with pytest.raises(ConfigError, match=rf"WORLD_SIZE=2 .*, but {lacking} is not set; .*type: unset WORLD_SIZE"):
        ranks.check_launcher()


def test_a_rank_beyond_the_processes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    surround(monkeypatch, WHOLE | {"RANK": "2"})
    with pytest.raises(ConfigError, match=r"RANK=2 is none of the 2 processes"):
        ranks.check_launcher()


def test_what_a_launcher_says_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    surround(monkeypatch, WHOLE)
    ranks.check_launcher()
    assert (ranks.world_size(), ranks.rank(), ranks.local_rank()) == (2, 1, 1)


@pytest.mark.parametrize("size", ["", "1", "many", "0"])
def test_a_single_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    surround(monkeypatch, {"WORLD_SIZE": size, "RANK": "3"})
    ranks.check_launcher()
    assert (ranks.world_size(), ranks.rank(), ranks.local_rank()) == (1, 0, 0)


@pytest.mark.parametrize(
    ("name", "value"), [("OMPI_COMM_WORLD_SIZE", "2"), ("PMI_SIZE", "4"), ("ACCELERATE_USE_DEEPSPEED", "true")]
)
def test_launchers_that_are_not_joined_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    surround(monkeypatch, {name: value})
    with pytest.raises(ConfigError, match=f"^{name}={value} .*unset {name}$"):
        ranks.check_launcher()


@pytest.mark.parametrize(
    "left", [{"LOCAL_RANK": "0"}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "1"}]
)
def test_what_a_launcher_left_makes_no_others(monkeypatch: pytest.MonkeyPatch, left: dict[str, str]) -> None:
    surround(monkeypatch, left)
    ranks.check_launcher()
    accelerator = build_accelerator(Precision.fp32, torch.device("cpu"))
    assert (accelerator.num_processes, accelerator.is_main_process) == (1, True)
    assert all(os.environ[name] == value for name, value in left.items())
