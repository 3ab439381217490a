"""Devices and precisions: what is requested and not there is an error."""

import types

import pytest
import torch

from finetune.config.schema import Device, Precision
from finetune.errors import ConfigError
from finetune.memory.device import memory_limit, peak_gib, pick_device, pick_dtype, pick_precision

CPU = torch.device("cpu")


def test_a_cpu_computes_in_fp32_by_default() -> None:
    assert pick_precision(Precision.auto, CPU) is Precision.fp32
    assert pick_dtype(Precision.auto, CPU) is torch.float32
    assert pick_dtype(Precision.bf16, CPU) is torch.bfloat16


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fp16 .*trainer.precision=fp32"):
        pick_precision(Precision.fp16, CPU)


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(Device.auto) == CPU
    with pytest.raises(ConfigError, match=r"hardware.device=cuda, .*hardware.device=auto"):
        pick_device(Device.cuda)


def test_peak_memory_of_a_cpu_is_the_process_s() -> None:
    assert 0.1 < peak_gib(CPU) < 100


def test_a_limit_of_gpu_memory_ends_with_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [0.9]  # the user's own
    total = types.SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: shares[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share))
    for vram_gib in (6.0, 0.0, 48.0):
        with memory_limit(torch.device("cuda"), vram_gib):
            pass
    with pytest.raises(RuntimeError), memory_limit(torch.device("cuda"), 12.0):
        raise RuntimeError
    assert shares == [0.9, 0.25, 0.9, 1.0, 0.9, 0.5, 0.9]
