"""What is said to be written is what is written."""

from pathlib import Path

import pytest
from torch import nn

from finetune.config.schema import ExportFormat, TrainerConfig
from finetune.planning.machine import read
from finetune.stages.export import export
from finetune.stages.plan import plans
from finetune.stages.train import train
from finetune.training import disk
from finetune.training.trainer import Trainer
from tests.unit.conftest import Setting

WEIGHTS = (".safetensors", ".pt", ".gguf")


def size(folder: Path) -> int:
    return sum(file.stat().st_size for ending in WEIGHTS for file in folder.rglob(f"*{ending}"))


def test_sizes_of_checkpoints_and_exports_are_those_of_the_files(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[nn.Module] = []
    start = Trainer.start
    monkeypatch.setattr(Trainer, "start", lambda self: (models.append(self.task.model), start(self))[1])
    config = setting.config
    config.lora.rank, config.trainer.ema_decay = 64, 0.9
    if config.model.kind == "language":
        config.export.formats, config.export.divergence = [ExportFormat.merged, ExportFormat.gguf], 9.0
    else:
        config.export.formats = [ExportFormat.diffusers, ExportFormat.kohya]
    planned = next(plans(config, [read(config.hardware)])).disk
    assert planned is not None
    run = train(config, setting.dataset)
    checkpoint = disk.checkpoint_bytes(models[0], config.optim.name, averaged=True)
    assert planned.checkpoint == checkpoint
    assert (planned.checkpoints, planned.kept) == disk.more_checkpoints(config.trainer, done=0, there=0)
    assert size(Path(run.checkpoint)) == pytest.approx(checkpoint, rel=0.15)  # names, and what is round in memory
    exported = disk.export_bytes(models[0], config.export.formats, averaged=True, quantised=False)
    assert planned.exports == exported
    assert size(Path(export(config, run).folder)) == pytest.approx(exported, rel=0.15)
    merged = ExportFormat.merged in config.export.formats
    twice = disk.export_bytes(models[0], config.export.formats, averaged=True, quantised=True)
    assert (twice > exported) == merged


@pytest.mark.parametrize(
    ("done", "there", "expected"),
    [
        (0, 0, (4, 3)),  # the two newest, the best, and the one that is written before an old one goes
        (2, 1, (3, 2)),
        (8, 3, (1, 0)),
        (10, 3, (0, 0)),  # nothing is to come
        (8, 9, (1, 0)),  # those that go do so after the next one is written
    ],
)
def test_so_many_checkpoints_lie_there_at_once(done: int, there: int, expected: tuple[int, int]) -> None:
    trainer = TrainerConfig(steps=10, save_every=2, keep_checkpoints=2, validate_every=5)
    assert disk.more_checkpoints(trainer, done=done, there=there) == expected
    short = TrainerConfig(steps=3, save_every=2, keep_checkpoints=5, validate_every=0)
    assert disk.more_checkpoints(short, done=0, there=0) == (2, 2)
