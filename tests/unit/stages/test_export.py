"""The export stage where the GPU is too small for what it compares."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune import kinds
from finetune.config.schema import Config, Device, Precision, Quantize
from finetune.run.records import Adapter, Run
from finetune.stages import export as stage
from finetune.stages.export import export
from finetune.stages.train import train
from tests.unit.conftest import Setting

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def weights_of(adapter: Adapter) -> dict[str, Tensor]:
    return load_file(Path(adapter.folder) / "peft" / "adapter_model.safetensors")


def test_a_card_too_small_for_the_comparison_leaves_it_to_main_memory(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half-written files of the attempt are gone, and the adapters are those of an export that fitted."""
    config = setting.config
    run = train(config, setting.dataset)
    fitting = weights_of(export(config, run))
    config.trainer.precision = Precision.fp16  # which a CPU can't do
    handout = kinds.kind(config).handout
    write, tried = handout.write, []

    def full(here: Config, run: Run, weights: Any, averaged: Any, folder: Path) -> Any:
        tried.append((here.hardware.device, sorted(path.name for path in folder.iterdir())))
        if here.hardware.device is not Device.cpu:
            (folder / "half").mkdir()
            (folder / "half.safetensors").write_bytes(b"half")
            raise FULL
        return write(here, run, weights, averaged, folder)

    monkeypatch.setattr(handout, "write", full)
    monkeypatch.setattr(stage, "pick_device", lambda wanted: torch.device("cuda"))
    capfd.readouterr()
    config.name += "_again"
    config.hardware.device = Device.auto
    found = export(config, run)
    assert tried == [(Device.auto, []), (Device.cpu, [])]
    said = "export: the GPU is too small; models are compared in CPU memory, which may take hours for large ones\n"
    assert said in capfd.readouterr().err
    assert weights_of(found).keys() == fitting.keys()
    assert all(torch.equal(weight, fitting[name]) for name, weight in weights_of(found).items())
    assert not list(Path(found.folder).glob("half*"))


def test_a_quantised_picture_model_has_no_other_place(
    config: Config, make_dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(config, make_dataset())
    config.model.quantize = Quantize.nf4
    monkeypatch.setattr(stage, "pick_device", lambda wanted: torch.device("cuda"))

    def full(*_: Any) -> Any:
        raise FULL

    monkeypatch.setattr(kinds.kind(config).handout, "write", full)
    with pytest.raises(torch.OutOfMemoryError):
        export(config, run)


def test_a_host_without_memory_is_not_tried_twice(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(setting.config, setting.dataset)
    monkeypatch.setattr(stage, "pick_device", lambda wanted: torch.device("cuda"))
    tried: list[bool] = []

    def full(*_: Any) -> Any:
        tried.append(True)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(kinds.kind(setting.config).handout, "write", full)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        export(setting.config, run)
    assert tried == [True]
