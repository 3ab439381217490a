"""What only a card can show: that memory really runs out, and that the levers really save some."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.config import Config, Device, Precision
from finetune.models import offload
from finetune.records import Dataset, Run
from finetune.stages.train import train
from finetune.training import checkpoint
from tests.unit.conftest import Setting
from tests.unit.training.test_memory import Card

pytestmark = pytest.mark.gpu


@pytest.fixture
def crowded(config: Config) -> Config:
    """Two steps of 256 pictures in one forward pass of each bucket, on the card and nothing else."""
    config.hardware.device, config.trainer.precision = Device.cuda, Precision.fp32
    config.trainer.steps, config.trainer.micro_batch, config.trainer.accumulate = 2, 256, 1
    config.trainer.validate_every, config.sample.previews, config.optim.eps = 0, 0, 1e-3
    return config


def test_a_card_that_is_squeezed_trains_the_same_adapter(
    crowded: Config, make_dataset: Callable[..., Dataset], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset()
    crowded.run_dir = str(tmp_path / "roomy")
    train(crowded, dataset)  # the libraries' own memory is taken now
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    crowded.run_dir = str(tmp_path / "measured")
    roomy = train(crowded, dataset)
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 0.6 * (peak - before)) / total)
    try:
        crowded.run_dir = str(tmp_path / "squeezed")
        squeezed = train(crowded, dataset)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert roomy.eased == ""
    assert squeezed.eased.startswith("micro-batch ")
    assert "step 1: memory ran out; going on with micro-batch " in capfd.readouterr().err
    assert (squeezed.steps, squeezed.items) == (roomy.steps, roomy.items) == (2, 512)
    one, other = (checkpoint.load(Path(run.checkpoint)).adapter for run in (roomy, squeezed))
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5) for name in one)


def alike(one: Run, other: Run) -> bool:
    """Whether two runs trained the same adapter but for rounding."""
    first, second = (checkpoint.load(Path(run.checkpoint)).adapter for run in (one, other))
    return all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-5) for name in first)


@pytest.fixture
def on_card(setting: Setting) -> Setting:
    """A run of each kind on the card."""
    config = setting.config
    config.hardware.device, config.trainer.precision, config.optim.eps = Device.cuda, Precision.fp32, 1e-3
    return setting


def test_blocks_in_main_memory_train_draw_and_resume_as_on_the_card(
    on_card: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, dataset = on_card.config, on_card.dataset
    config.run_dir = str(tmp_path / "resident")
    resident = train(config, dataset)
    monkeypatch.setattr(offload, "WEIGHTS_SHARE", 0.0)
    config.run_dir, config.model.offload, config.trainer.steps = str(tmp_path / "away"), True, 2
    config.optim.schedule = type(config.optim.schedule).constant
    train(config, dataset)
    config.trainer.steps = 4
    away = train(config, dataset)
    config.run_dir, config.model.offload = str(tmp_path / "constant"), False
    assert "stay in main memory" in capfd.readouterr().err
    assert alike(away, train(config, dataset))
    assert resident.steps == away.steps == 4


def test_the_last_rung_keeps_blocks_in_main_memory(
    on_card: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, dataset = on_card.config, on_card.dataset
    config.run_dir = str(tmp_path / "roomy")
    roomy = train(config, dataset)
    away: list[bool] = []
    stream = offload.stream
    monkeypatch.setattr(offload, "stream", lambda *arguments: (stream(*arguments), away.append(True)))
    Card(lambda *_: bool(away), "backward").install(monkeypatch)
    config.run_dir = str(tmp_path / "full")
    full = train(config, dataset)
    assert full.eased == "micro-batch 1 instead of 2, trainer.checkpointing=1, model.offload=true"
    assert alike(full, roomy)
