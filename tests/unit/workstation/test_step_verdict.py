"""What is said of where a step's time goes, and which settings are named."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.planning.plan import Setting
from finetune.run.step_time import StepTime
from finetune.workstation.step_verdict import judge

MATMUL = {"matmul": 0.5, "attention": 0.1, "element-wise": 0.1, "launch gaps": 0.05}


def step(
    micro_batch: int = 2, accumulate: int = 4, *, parts: dict[str, float], seconds: float = 1.0, **settings: Any
) -> StepTime:
    given = {"micro_batch": micro_batch, "accumulate": accumulate, "checkpointing": 0, "offload_activations": False}
    return StepTime(
        settings=given | {"offload": False} | settings,
        seconds=seconds,
        fastest_s=seconds,
        slowest_s=seconds,
        traced_s=seconds,
        parts={"launch gaps": 0.0} | parts,
        largest={},
        unit="images",
        count=micro_batch * accumulate,
        peak_gib=1.0,
        trace="",
    )


class Plan:
    """Micro-batches of 8 take half the time of all others."""

    def __init__(self, offload: bool = False) -> None:
        self.best = self.setting(8, 0, False, offload)
        self.candidates = SimpleNamespace(setting=self.setting)

    def setting(self, micro_batch: int, checkpointing: int, away: bool, offload: bool = False) -> Setting:
        seconds = 0.5 if micro_batch == 8 else 1.0
        return Setting(micro_batch, 8 // micro_batch, checkpointing, away, offload, seconds, 8, {})


def words(*times: StepTime, planned: Any = None, fast: bool = True, chooses: bool = False) -> Any:
    return judge(times, planned, fast=fast, chooses=chooses)


@pytest.mark.parametrize(
    ("parts", "settings", "said"),
    [
        ({"waiting for data": 0.5}, {}, "The GPU waits for data 50% of a step: put the cache on a faster disk"),
        (
            {"host-device copies": 0.2},
            {"offload": True},
            "The GPU waits for copies from and to CPU memory 20% of a step (model.offload keep",
        ),
        ({"launch gaps": 0.4}, {}, "The GPU is idle 40% of a step, because the host launches its kernels too slowly"),
        ({"launch gaps": 0.4}, {}, "up to 67% to gain"),
        (MATMUL, {}, "The GPU computes 95% of a step. Most is matmul, 50%."),
    ],
)
def test_what_holds_a_gpu_back_is_named(parts: dict[str, float], settings: dict[str, Any], said: str) -> None:
    found = words(step(parts=parts, **settings))
    assert said in found.words
    assert found.words.endswith("There is no plan to compare with.")
    assert (found.change, found.expected) == ((), None)


def test_the_plan_names_a_change_and_what_it_gains() -> None:
    found = words(step(parts=MATMUL), planned=Plan())
    assert found.change == ("trainer.micro_batch=8", "trainer.accumulate=1")
    assert found.expected == 1.0
    assert words(step(parts=MATMUL), planned=Plan(), chooses=True).change[-1] == "trainer.autotune=check"
    assert words(step(8, 1, parts=MATMUL), planned=Plan()).change == ()
    assert words(step(parts=MATMUL, offload=True), planned=Plan()).change == (), "the plan is of something else"


def test_what_was_measured_counts_more_than_the_plan() -> None:
    faster = step(4, 2, parts=MATMUL, seconds=0.8)
    found = words(step(parts=MATMUL), faster, planned=Plan())
    assert found.change == ("trainer.micro_batch=4", "trainer.accumulate=2")
    assert found.expected == pytest.approx(0.25)


def test_a_larger_batch_is_told_but_not_advised() -> None:
    found = words(step(parts=MATMUL), step(16, 1, parts=MATMUL))
    assert "16 × 1 takes 100% more images a second, but is another batch: it trains otherwise." in found.words
    assert found.change == ()


def test_small_kernels_are_a_reason_for_fast_ones() -> None:
    found = words(step(parts={"launch gaps": 0.5}), fast=False)
    assert (found.change, found.expected) == (("trainer.fast=true",), None)
    assert words(step(parts={"launch gaps": 0.5}), fast=True).change == ()


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"between operations": 0.5}, "Python and PyTorch take 50% of a step around short operations."),
        ({"between operations": 0.1, "matmul": 0.6}, "The processor computes 90% of a step. Most is matmul, 60%."),
        ({"between operations": 0.1, "waiting for data": 0.6}, "The step waits for data 60% of its time."),
    ],
)
def test_what_holds_a_cpu_back_is_named(parts: dict[str, float], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = step(parts=parts)
    del own.parts["launch gaps"]
    cores = set(range(torch.get_num_threads()))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    assert words(own).words == f"{said} There is no plan to compare with."
    cores |= {99}
    assert f"It computes on {len(cores) - 1} of {len(cores)} cores: OMP_NUM_THREADS={len(cores)}" in words(own).words
