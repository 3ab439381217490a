"""The machine of a plan: presets, GPUs by name, and this very machine."""

from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from finetune.config import recipes
from finetune.config.schema import Device, HardwareConfig, Precision
from finetune.errors import ConfigError
from finetune.planning import machine

GPUS = ["a100_80gb", "a6000", "h100", "h200", "l40s", "rtx3060_12gb", "rtx3090", "rtx4080", "rtx4090", "rtx5090"]


def test_every_gpu_has_a_preset_with_its_facts() -> None:
    presets = recipes.preset_files()["hardware"]
    assert sorted(presets) == sorted([*GPUS, "auto", "cpu"])
    for name in GPUS:
        facts = yaml.safe_load(presets[name].read_text())
        assert facts["device"] == "cuda"
        assert 10 < facts["vram_gib"] < 140
        assert 20 < facts["tflops"] < 1000
        assert facts["fp32_tflops"] < 0.51 * facts["tflops"]
        assert 300 < facts["gb_per_s"] < 5000
        assert recipes.title(presets[name]).endswith("GB.")


def test_a_preset_needs_no_gpu() -> None:
    found = machine.read(HardwareConfig(Device.cuda, 23.5, "NVIDIA GeForce RTX 4090", True, 165.2, 82.6, 1008))
    assert (found.cuda, found.vram_gib, found.tflops) == (True, 23.5, 165.2)
    assert found.precision(Precision.auto) is Precision.bf16
    older = machine.read(HardwareConfig(Device.cuda, 11.0, "an older GPU", False, 50.0, 10.0, 300))
    assert older.precision(Precision.auto) is Precision.fp16


def test_a_gpu_without_its_facts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hardware.gb_per_s .* hardware=rtx4090"):
        machine.read(HardwareConfig(Device.cuda, 23.5, "a GPU", True, 165.2, 82.6))
    with pytest.raises(ConfigError, match=r"hardware.pcie_gb_per_s "):
        machine.read(HardwareConfig(Device.cuda, 23.5, "a GPU", True, 165.2, 82.6, 1008, pcie_gb_per_s=0))


def test_this_machine_is_read() -> None:
    found = machine.read(HardwareConfig(Device.cpu))
    assert not found.cuda
    assert found.vram_gib > 0.5
    assert found.tflops > 0 < found.gb_per_s
    assert "cores" in found.words
    assert found.precision(Precision.auto) is Precision.fp32
    assert machine.read(HardwareConfig(Device.cpu, vram_gib=0.25)).vram_gib == 0.25


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"fp16 .* trainer.precision=fp32"):
        machine.read(HardwareConfig(Device.cpu)).precision(Precision.fp16)


@pytest.mark.parametrize(("name", "tflops"), [("NVIDIA GeForce RTX 4090", 165.2), ("a GPU of tomorrow", 100.0)])
def test_a_gpu_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float) -> None:
    gpu = SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        get_device_name=lambda: name,
        mem_get_info=lambda: (20 * 2**30, 24 * 2**30),
        is_bf16_supported=lambda including_emulation: True,
    )
    monkeypatch.setattr(torch, "cuda", gpu)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(machine, "pick_device", lambda wanted: torch.device("cuda", 0))
    found = machine.read(HardwareConfig())
    assert (found.name, found.tflops, found.known) == (name, tflops, tflops != 100.0)
    assert found.vram_gib == 20.5
    assert "20.5 of 24.0 GiB" in found.words
    assert found.cpu_gib == psutil.virtual_memory().available / machine.GIB
    assert machine.read(HardwareConfig(vram_gib=8.0)).vram_gib == 8.0
