"""The candidates: one effective batch in many ways, figures that follow from traces, and points measured on a GPU."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune import kinds
from finetune.config.schema import Config, Device, Precision, Quantize
from finetune.memory import block_offload
from finetune.planning import speed
from finetune.planning.candidates import OUTSIDE, Candidates, fastest, parts
from finetune.planning.machine import GIB, Machine
from finetune.planning.plan import Setting
from tests.tiny_models import save_diffusion
from tests.unit.conftest import image_config, talking_config

pytestmark = pytest.mark.sampled
GPU = Machine("a GPU", True, 24.0, 0.5, True, 165.2, 82.6, 1008, 20.0, known=True)
NO_FOLDER = "none"  # an empty name would be the current folder, with all its files
ATTENTION = {"attention": ["to_q", "to_k", "to_v", "to_out.0"]}


def on_a_gpu(config: Config, effective: int = 8) -> Config:
    config.hardware.device, config.trainer.precision = Device.cuda, Precision.auto
    config.trainer.micro_batch, config.trainer.accumulate = effective, 1
    return config


def candidates_of(config: Config, machine: Machine = GPU) -> Candidates:
    return Candidates(kinds.of(config).workload(config), machine)


def tensors_gib(found: Mapping[str, float]) -> float:
    """Of the parts of a setting, what tensors take."""
    return sum(gib for name, gib in found.items() if name not in OUTSIDE)


@pytest.fixture(scope="module", params=["diffusion", "language"])
def candidates(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_language: Path
) -> Candidates:
    """Of each kind of model. Shared, because traces take time: no test changes them."""
    folder = tmp_path_factory.mktemp(request.param)
    images = request.param == "diffusion"
    base = save_diffusion(folder / "base", whole=True) if images else tiny_language  # of the smallest all is overhead
    config = image_config(folder, base) if images else talking_config(folder, base)
    return candidates_of(on_a_gpu(config))


def test_levels_keep_the_effective_batch_and_the_fastest_that_fits_is_taken(candidates: Candidates) -> None:
    everything = [setting for level in (0, 1, 2) for setting in candidates.level(level)]
    assert {setting.micro_batch * setting.accumulate for setting in everything} == {8}
    for budget in (*(setting.gib for setting in everything), 0.0):
        best = fastest(everything, budget)
        fitting = [setting.seconds for setting in everything if setting.gib <= budget]
        assert (best and best.seconds) == (min(fitting) if fitting else None)
        assert best is None or best.gib <= budget


def test_offloaded_activations_save_as_much_as_is_copied(
    candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With activation checkpointing the inputs of blocks are offloaded, without it everything."""
    monkeypatch.setattr("finetune.memory.activation_offload.WORTH_BYTES", 0)
    monkeypatch.setattr(speed, "AROUND_REPLAY_S", 0.0)  # would be most of so small a step
    for level in (0, 1):
        kept, away = candidates.step(4, level), candidates.step(4, level, away=True)
        saved = kept.peak.live - away.peak.live
        assert saved > 0
        assert 0.5 * saved <= away.away
        assert kept.away == 0
        assert candidates.setting(4, level, away=True).seconds > candidates.setting(4, level).seconds
    assert candidates.step(4, 1, away=True).away < candidates.step(4, 0, away=True).away


def test_activation_checkpointing_saves_memory_and_costs_time(
    candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "AROUND_REPLAY_S", 0.0)  # would be most of so small a step
    none, every_second, every = (candidates.setting(4, level) for level in (0, 2, 1))
    assert none.gib > every_second.gib > every.gib
    assert none.seconds < every_second.seconds < every.seconds


def test_extrapolating_agrees_with_tracing(candidates: Candidates) -> None:
    for micro_batch in (1, 2, 8):
        traced = parts(candidates.step(micro_batch, 0), GPU)
        assert tensors_gib(candidates.setting(micro_batch, 0).parts) == pytest.approx(tensors_gib(traced), rel=0.02)


def test_the_parts_are_the_whole(candidates: Candidates) -> None:
    trace = candidates.step(2, 0)
    found = parts(trace, GPU)
    assert {"weights", "adapters", "gradients", "optimiser", "activations", "CUDA itself"} <= found.keys()
    assert found["optimiser"] == pytest.approx(2 * found["adapters"], rel=1e-6)  # two states in fp32
    assert tensors_gib(found) * GIB == pytest.approx(trace.peak.live)


def test_an_averaged_adapter_is_counted(config: Config) -> None:
    plain = candidates_of(on_a_gpu(config)).held
    config.trainer.ema_decay = 0.99
    averaged = candidates_of(config).held
    assert averaged.keys() - plain.keys() == {"averaged adapter"}
    assert 0 < averaged["averaged adapter"] <= plain["optimiser"] / 2  # which has two states, in whole blocks of memory


def test_a_step_of_one_example(config: Config) -> None:
    candidates = candidates_of(on_a_gpu(config, 1))
    assert [setting.micro_batch for setting in candidates.level(0)] == [1]
    assert sum(candidates.setting(1, 0).parts.values()) == sum(parts(candidates.step(1, 0), GPU).values())


def test_offloaded_blocks_leave_the_gpu_and_take_time_where_copies_are_slow(
    language_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_offload, "RING_SLOTS", 1)  # a ring of two is all that this model has
    language_config.trainer.fast = False  # which offloaded blocks never are
    small = replace(GPU, vram_gib=0.5001)
    kept = candidates_of(on_a_gpu(language_config), small).setting(1, 1)
    language_config.model.offload = True
    away = candidates_of(language_config, small).setting(1, 1)
    assert away.gib < kept.gib
    assert away.seconds == pytest.approx(kept.seconds)
    assert "model.offload=true" in away.overrides
    narrow = candidates_of(language_config, replace(small, pcie_gb_per_s=1e-6)).setting(1, 1)
    assert narrow.seconds > 2 * kept.seconds


def test_seconds_follow_the_machine() -> None:
    config = Config()
    config.data.folder = NO_FOLDER
    config.model.lora_targets, config.trainer.micro_batch, config.trainer.accumulate = ATTENTION, 4, 1
    config.hardware.device = Device.cuda
    trace = candidates_of(config).step(4, 0)
    slow = replace(GPU, tflops=GPU.tflops / 4, gb_per_s=GPU.gb_per_s / 400)
    assert speed.seconds(trace, GPU, Precision.bf16) == pytest.approx(speed.LAUNCH_S * trace.launches)
    assert speed.seconds(trace, slow, Precision.bf16) > speed.seconds(trace, GPU, Precision.bf16)
    assert "TFLOP/s" in speed.explained(GPU, Precision.bf16)
    cpu = replace(GPU, cuda=False, tflops=0.2, fp32_tflops=0.2, gb_per_s=30)
    slower = replace(cpu, tflops=0.1, fp32_tflops=0.1, gb_per_s=15)
    taken = speed.seconds(trace, cpu, Precision.fp32)
    assert speed.seconds(trace, slower, Precision.fp32) == pytest.approx(2 * taken)
    assert taken > trace.flops / 0.2e12  # no kernel comes to what was measured
    assert "50% of the 200 GFLOP/s and 30 GB/s measured now" in speed.explained(cpu, Precision.fp32)
    assert "assumed" in speed.explained(replace(GPU, known=False), Precision.bf16)


def measured(base: str, family: str, side: int, fast: bool) -> Config:
    """As on the H200: square images, rank-16 adapters on attention without dropout, bf16."""
    config = Config()
    config.data.folder = NO_FOLDER
    config.model.base, config.model.family, config.model.resolution = base, family, side
    config.model.bucket_step, config.model.lora_targets, config.data.max_aspect = 64, ATTENTION, 1.0
    config.lora.rank, config.lora.dropout, config.trainer.micro_batch = 16, 0.0, 16
    config.hardware.device, config.trainer.fast = Device.cuda, fast
    return config


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("base", "family", "side", "fast", "points"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd", 512, False, {4: 6.09, 16: 19.12}),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd", 512, True, {4: 5.4, 16: 15.2}),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", 1024, False, {1: 12.83, 2: 20.13}),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", 1024, True, {2: 14.7, 4: 24.3}),
    ],
    ids=["sd", "sd-fast", "sdxl", "sdxl-fast"],
)
def test_stable_diffusion_as_measured(base: str, family: str, side: int, fast: bool, points: dict[int, float]) -> None:
    """With plain blocks by the trainer; with fast ones as steps alone (docs/decisions/0025-fast-blocks-of-unets.md)."""
    candidates = candidates_of(measured(base, family, side, fast))
    for micro_batch, gib in points.items():
        assert candidates.step(micro_batch, 0).peak.live / GIB == pytest.approx(gib, rel=0.12)


@pytest.mark.parametrize("quantize", list(Quantize), ids=lambda how: how.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_storage_is_traced(language_config: Config, quantize: Quantize, dtype: torch.dtype) -> None:
    language_config.model.quantize = quantize
    workload = kinds.of(language_config).workload(language_config)
    memory_model = workload.build(workload.model, dtype, True, GIB)
    trace = memory_model.tracer.step(
        memory_model.model, lambda: memory_model.inputs(2), memory_model.forward, memory_model.loss
    )
    assert trace.peak.live > sum(trace.held.values())
    names = {kernel.name for kernel in trace.kernels}
    assert ("torch_attn._varlen_attn.default" in names) is (dtype is torch.bfloat16)  # masks in fp32


def test_settings_have_the_overrides_to_type() -> None:
    setting = Setting(4, 2, 1, False, False, 1.0, 8, {"weights": 1.0, "activations": 2.0})
    assert setting.gib == 3.0
    assert setting.overrides == ("trainer.micro_batch=4", "trainer.accumulate=2", "trainer.activation_checkpointing=1")


@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_many_lengths_are_no_graphs(language_config: Config, packing: bool) -> None:
    language_config.data.packing = packing
    assert candidates_of(on_a_gpu(language_config)).memory_model.replayed(0, False) == packing
