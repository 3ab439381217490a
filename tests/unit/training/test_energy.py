"""What a run's GPUs take: by NVML's counter, by its power, or unknown; and what the report makes of it."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from finetune.config.describe import as_dict
from finetune.config.schema import Config
from finetune.run import rundir
from finetune.run.records import Dataset
from finetune.stages.report import report
from finetune.stages.train import train
from finetune.training import tracking
from finetune.training.energy import Energy
from tests.unit.workstation.gpus import AT_WORK, GEFORCE, stand_in


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look is ten seconds after the one before."""
    monkeypatch.setattr(time, "monotonic", itertools.count(0.0, 10.0).__next__)


def test_the_counters_of_all_gpus_are_added(monkeypatch: pytest.MonkeyPatch, clock: None) -> None:
    counters = {0: 5_000, 1: 70_000}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", counters.__getitem__)
    energy = Energy([0, 1])
    counters |= {0: 6_000, 1: 72_500}
    assert energy.look() == (3.5, 10.0)
    assert energy.look() == (0.0, 10.0)


def test_power_counts_where_there_is_no_counter(monkeypatch: pytest.MonkeyPatch, clock: None) -> None:
    stand_in(monkeypatch, GEFORCE | {"nvmlDeviceGetPowerUsage": 200_000})
    assert Energy([0]).look() == (2000.0, 10.0)


def test_what_nobody_tells_is_unknown_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, GEFORCE)
    assert Energy([0]).look() is None
    assert Energy([]).look() is None


def test_the_driver_is_opened_once_for_power_and_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[None] = []
    stand_in(monkeypatch, AT_WORK | {"nvmlDeviceGetHandleByUUID": "handle"})
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: opened.append(None))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0"))
    tracker = tracking.Tracker(tmp_path, 0, torch.device("cuda"))
    tracker.close()
    assert tracker.gpu.read() == {"system/gpu_utilisation_percent": 97.0, "system/gpu_power_w": 402.123}
    assert tracker.energy.handles == ["handle"]
    assert len(opened) == 1


def test_a_run_counts_its_energy_and_its_report_the_cost(
    config: Config, make_dataset: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, AT_WORK)
    joules = itertools.count(1_000_000, 900_000_000)  # a quarter of a kilowatt-hour at each look, in millijoules
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda _: next(joules))
    monkeypatch.setattr(tracking, "handles", lambda _: [0])
    config.trainer.log_every = 100  # then it is looked at with each of the two checkpoints, and the last step
    run = train(config, make_dataset())
    assert run.energy_j == 3 * 900_000
    assert run.energy_s > 0
    rundir.write_config(as_dict(config), Path(config.run_dir))
    config.cost.per_kwh, config.cost.currency, config.cost.rented_gpu = 0.4, "CHF", "A100 at a cloud"
    config.cost.rented_per_hour = 1e6
    page = Path(report(config).file).read_text(encoding="utf-8")
    assert "<dt>GPU energy</dt><dd>0.75 kWh</dd>" in page
    assert "<dt>electricity</dt><dd>0.30 CHF</dd><dd>0.4 CHF/kWh</dd>" in page
    assert "A100 at a cloud at 1e+06 CHF/h, if it is as fast" in page
    config.cost.per_kwh = config.cost.rented_per_hour = 0.0
    page = Path(report(config).file).read_text(encoding="utf-8")
    assert "GPU energy" in page
    assert "CHF" not in page.partition("<nav>")[0]
