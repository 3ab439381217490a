"""The export stage where the GPU is too small for what it compares."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune import kinds
from finetune.config.schema import Config, Device, Precision, Quantize
from finetune.run.records import Adapter, Dataset, Run
from finetune.stages.export import export
from finetune.stages.train import train
from tests.unit.conftest import Setting

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def weights_of(adapter: Adapter) -> dict[str, Tensor]:
    return load_file(Path(adapter.folder) / "peft" / "adapter_model.safetensors")


def on_a_gpu(config: Config, write: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind's export is `write`, and there is a GPU where the configuration doesn't ask for the CPU."""
    kind, pick_device = kinds.of(config), kinds.of(config).pick_device  # type: ignore[attr-defined]

    def with_gpu(wanted: Device) -> torch.device:
        return pick_device(wanted) if wanted is Device.cpu else torch.device("cuda")

    config.hardware.device = Device.auto
    monkeypatch.setattr(kind, "export", write)
    monkeypatch.setattr(kind, "pick_device", with_gpu)


def test_a_gpu_too_small_for_the_comparison_leaves_it_to_the_cpu(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half-written files of the attempt are gone, and the adapters are those of an export that fitted."""
    config = setting.config
    run = train(config, setting.dataset)
    fitting = weights_of(export(config, run))
    config.trainer.precision = Precision.fp16  # which a CPU can't do
    write = kinds.of(config).export
    tried: list[tuple[Device, list[str]]] = []

    def full(here: Config, run: Run, weights: Any, averaged: Any, folder: Path) -> Any:
        tried.append((here.hardware.device, sorted(path.name for path in folder.iterdir())))
        if here.hardware.device is not Device.cpu:
            (folder / "half").mkdir()
            (folder / "half.safetensors").write_bytes(b"half")
            raise FULL
        return write(here, run, weights, averaged, folder)

    on_a_gpu(config, full, monkeypatch)
    capfd.readouterr()
    config.name += "_again"
    found = export(config, run)
    assert tried == [(Device.auto, []), (Device.cpu, [])]
    assert "export: the GPU is too small; models are compared in CPU memory" in capfd.readouterr().err
    assert weights_of(found).keys() == fitting.keys()
    assert all(torch.equal(weight, fitting[name]) for name, weight in weights_of(found).items())
    assert not list(Path(found.folder).glob("half*"))


def test_a_quantised_image_model_is_compared_on_the_gpu_alone(
    config: Config, make_dataset: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(config, make_dataset())
    config.model.quantize, config.trainer.precision = Quantize.nf4, Precision.fp16

    def full(*_: Any) -> Any:
        raise FULL

    on_a_gpu(config, full, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        export(config, run)


def test_too_little_cpu_memory_is_not_tried_twice(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(setting.config, setting.dataset)
    setting.config.trainer.precision = Precision.fp16
    tried: list[bool] = []

    def full(*_: Any) -> Any:
        tried.append(True)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    on_a_gpu(setting.config, full, monkeypatch)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        export(setting.config, run)
    assert tried == [True]
