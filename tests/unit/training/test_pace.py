"""Steps that turn slow: said when they stay slow, and not for noise, other shapes, single pauses or a slow start."""

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from finetune.training import pace
from finetune.training.loop import Step
from finetune.training.pace import Pace, slowdown_hint
from finetune.training.tracking import GIB, SLOWDOWNS, _Gpu

USUAL = [0.5] * 40


def told(seconds: Iterable[float], padded_count: Iterable[int] | None = None, found: Pace | None = None) -> list[int]:
    """Steps, from 1, at which something is said."""
    found = found or Pace(0)
    seconds = list(seconds)
    counts = list(padded_count) if padded_count else [16] * len(seconds)
    steps = [step(number, *each) for number, each in enumerate(zip(seconds, counts, strict=True), 1)]
    return [taken.number for taken in steps if found.note(taken)]


def step(number: int, seconds: float, padded_count: int = 16, oom_fallbacks: tuple[str, ...] = ()) -> Step:
    return Step(number, 1.0, 1.0, 1e-3, padded_count, padded_count, seconds, None, oom_fallbacks)


def test_a_jump_that_stays_is_told_once_and_every_slow_step_is_counted() -> None:
    found = Pace(2)  # of before a pause
    assert told([*USUAL, *[4.0] * 30], found=found) == [len(USUAL) + pace.ROW]
    assert found.slow == 2 + 30
    assert found.times == pytest.approx(8.0)


def test_after_a_recovery_the_next_jump_is_told_too() -> None:
    found = Pace(0)
    assert told([*USUAL, *[4.0] * 10, *USUAL, *[2.0] * 10], found=found) == [45, 95]
    assert found.slow == 20
    assert found.times == pytest.approx(4.0)


def test_noise_is_no_jump() -> None:
    drawn = random.Random(0)
    assert told(0.5 * drawn.lognormvariate(0, 0.4) for _ in range(2000)) == []


def test_a_warm_up_is_no_measure_and_no_jump() -> None:
    assert told([90.0, 30.0, 20.0, *USUAL]) == []
    assert told([90.0, 30.0, 20.0, *USUAL, *[4.0] * 5]) == [48]


def test_single_pauses_are_no_jump() -> None:
    """After a checkpoint or a validation; four in a row are not enough either."""
    assert told([*USUAL, *([10.0] + [0.5] * 9) * 20, *[10.0] * 4, *USUAL]) == []


def test_larger_steps_take_longer() -> None:
    """Fewer and more slots in turn, at the same speed and at one that falls with length as attention does."""
    padded_count = [1024 if number // 10 % 2 == 0 else 8192 for number in range(200)]
    assert told([count / 2000 for count in padded_count], padded_count) == []
    assert told([count / 2000 * (1 + count / 8192) for count in padded_count], padded_count) == []


def test_a_creeping_change_is_followed() -> None:
    """Ten times as long in the end, but never a jump: a GPU that warms up, a cache that fills."""
    assert told(0.5 * 1.01**number for number in range(232)) == []


def test_smaller_micro_batches_start_anew() -> None:
    found = Pace(0)
    assert told(USUAL, found=found) == []
    assert not found.note(step(41, 60.0, oom_fallbacks=("micro-batch 1",)))
    assert told([4.0] * 40, found=found) == []
    assert told([40.0] * 5, found=found) == [5]


def test_milliseconds_are_not_worth_a_word() -> None:
    assert told([0.01] * 40 + [0.05] * 20) == []
    assert told([0.01] * 40 + [0.05] * 100) == [40 + 50]  # two seconds lost


def test_what_is_likely_and_what_to_type() -> None:
    assert slowdown_hint([], 0.0).endswith("OMP_WAIT_POLICY=PASSIVE in front of the command helps")
    assert slowdown_hint([], 24.0) == (
        "likely memory spilling to CPU memory, another program on the GPU, or heat; "
        "nvidia-smi lists other programs, hardware.vram_gib=22 keeps memory from spilling"
    )
    assert slowdown_hint(["only 0.1 of 24.0 GiB are free", "hot"], 24.0).startswith(
        "the GPU says: only 0.1 of 24.0 GiB are free, hot; nvidia-smi"
    )


def test_what_the_card_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    class Memory:
        free, used, total = int(0.1 * GIB), int(23.9 * GIB), 24 * GIB

    answers: dict[str, Any] = {
        "nvmlDeviceGetMemoryInfo": Memory,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x40 | 0x4,
        "nvmlDeviceGetTemperature": 95,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 20 * GIB)
    gpu = _Gpu(torch.device("cpu"))
    assert gpu.throttle_reasons() == []
    gpu.handle = object()
    assert gpu.throttle_reasons() == [
        "only 0.1 of 24.0 GiB are free",
        "3.9 GiB belong to other programs",
        "it runs slower for heat or lack of power, at 95 °C",
    ]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda _: 0x4)  # at its power limit
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 23 * GIB)
    assert gpu.throttle_reasons() == ["only 0.1 of 24.0 GiB are free"]
    assert (
        pynvml.nvmlClocksThrottleReasonHwSlowdown
        | pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    ) == SLOWDOWNS

    def refuse(_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", refuse)
    assert gpu.throttle_reasons() == []
