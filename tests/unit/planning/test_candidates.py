"""The candidates: one effective batch in many ways, figures that follow from traces, and points measured on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune import kinds
from finetune.config.schema import Config, Device, Precision, Quantize
from finetune.memory import block_offload, checkpointing
from finetune.planning import speed
from finetune.planning.candidates import Candidates, fastest, parts, thriftier
from finetune.planning.machine import GIB, Machine
from finetune.planning.plan import Setting
from tests.unit.conftest import image_config, talking_config

GPU = Machine("a GPU", True, 24.0, 0.5, True, 165.2, 82.6, 1008, 20.0, known=True)
ATTENTION = {"attention": ["to_q", "to_k", "to_v", "to_out.0"]}


def on_a_card(config: Config, effective: int = 8) -> Config:
    config.hardware.device, config.trainer.precision = Device.cuda, Precision.auto
    config.trainer.micro_batch, config.trainer.accumulate = effective, 1
    return config


@pytest.fixture(scope="module", params=["diffusion", "language"])
def candidates(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_language: Path
) -> Candidates:
    """Of a kind of model. What was traced once needn't be traced again: tests ask, and change nothing."""
    folder = tmp_path_factory.mktemp(request.param)
    images = request.param == "diffusion"
    config = image_config(folder, tiny_base) if images else talking_config(folder, tiny_language)
    return Candidates(on_a_card(config), GPU)


def test_levels_keep_the_effective_batch_and_the_fastest_that_fits_is_taken(candidates: Candidates) -> None:
    everything = [setting for level in (0, 1, 2) for setting in candidates.level(level)]
    assert {setting.micro_batch * setting.accumulate for setting in everything} == {8}
    for budget in (*(setting.gib for setting in everything), 0.0):
        best = fastest(everything, budget)
        fitting = [setting.seconds for setting in everything if setting.gib <= budget]
        assert (best and best.seconds) == (min(fitting) if fitting else None)
        assert best is None or best.gib <= budget


def test_activations_in_main_memory_save_as_much_as_is_copied(
    candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed blocks leave their inputs; without recomputing everything goes."""
    monkeypatch.setattr("finetune.memory.activation_offload.WORTH_BYTES", 0)
    for level in (0, 1):
        kept, away = candidates.step(4, level), candidates.step(4, level, away=True)
        saved = kept.peak.live - away.peak.live
        assert saved > 0
        assert 0.5 * saved <= away.away
        assert kept.away == 0
        assert candidates.setting(4, level, away=True).seconds > candidates.setting(4, level).seconds
    assert candidates.step(4, 1, away=True).away < candidates.step(4, 0, away=True).away


def test_recomputing_saves_memory_and_costs_time(candidates: Candidates) -> None:
    none, every_second, every = (candidates.setting(4, level) for level in (0, 2, 1))
    assert none.gib > every_second.gib > every.gib
    assert none.seconds < every_second.seconds < every.seconds


def test_drawing_on_agrees_with_tracing(candidates: Candidates) -> None:
    memory_model = candidates.memory_model

    def trace(micro_batch: int) -> float:
        found = memory_model.tracer.step(
            memory_model.model,
            lambda: memory_model.inputs(micro_batch),
            memory_model.forward,
            memory_model.loss,
            held=candidates.held,
        )
        return found.peak.live

    checkpointing.set_checkpointing(memory_model.model, 0)
    for micro_batch in (1, 2, 8):
        drawn = candidates._trace(micro_batch, 0, away=False)
        assert drawn.peak.live == pytest.approx(trace(micro_batch), rel=0.02)


def test_the_parts_are_the_whole(candidates: Candidates) -> None:
    trace = candidates._step(2)
    found = parts(trace, GPU)
    assert {"weights", "adapters", "gradients", "optimiser", "activations", "CUDA context"} <= found.keys()
    assert found["optimiser"] == pytest.approx(2 * found["adapters"], rel=1e-6)  # two states in fp32
    offloaded_blocks = sum(found.values()) - found["CUDA context"] - found["allocator slack"]
    assert offloaded_blocks * GIB == pytest.approx(trace.peak.live)


def test_an_average_and_a_thrifty_optimiser_are_counted(config: Config) -> None:
    plain = Candidates(on_a_card(config), GPU).held
    config.trainer.ema_decay = 0.99
    averaged = Candidates(config, GPU).held
    assert averaged.keys() - plain.keys() == {"averaged adapter"}
    assert 0 < averaged["averaged adapter"] <= plain["optimiser"] / 2  # which has two states, in whole blocks of memory


def test_a_step_of_one_example(config: Config) -> None:
    candidates = Candidates(on_a_card(config, 1), GPU)
    assert [setting.micro_batch for setting in candidates.level(0)] == [1]
    assert sum(candidates.setting(1, 0).parts.values()) == sum(parts(candidates.step(1, 0), GPU).values())


def test_offloaded_weights_leave_the_card_and_take_time_where_copies_are_slower_than_work(
    language_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_offload, "RING_SLOTS", 1)  # a ring of two is all that this model has
    small = replace(GPU, vram_gib=0.5001)
    kept = Candidates(on_a_card(language_config), small).setting(1, 1)
    language_config.model.offload = True
    away = Candidates(language_config, small).setting(1, 1)
    assert away.gib < kept.gib
    assert away.seconds == pytest.approx(kept.seconds)
    assert "model.offload=true" in away.overrides
    narrow = Candidates(language_config, replace(small, pcie_gb_per_s=1e-6)).setting(1, 1)
    assert narrow.seconds > 2 * kept.seconds


def test_seconds_follow_the_card() -> None:
    config = Config()
    config.model.lora_targets, config.trainer.micro_batch, config.trainer.accumulate = ATTENTION, 4, 1
    config.hardware.device = Device.cuda
    candidates = Candidates(config, GPU)
    trace = candidates._step(4)
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


def test_what_would_fit_changes_one_thing_after_another(config: Config, language_config: Config) -> None:
    config.model.resolution = 512
    quantised = ["model.quantize=int8", "model.quantize=nf4"]
    smaller = [f"model.quantize=nf4 model.resolution={side}" for side in (384, 256, 128)]
    assert [words for words, _ in thriftier(config)] == quantised + smaller
    language_config.data.length = 2048
    words = [words for words, _ in thriftier(language_config)]
    assert words[:3] == ["model.quantize=int8", "model.quantize=nf4", "model.quantize=nf4 data.length=1024"]
    language_config.model.quantize = Quantize.nf4
    assert next(words for words, _ in thriftier(language_config)) == "data.length=1024"


def measured(base: str, family: str, side: int) -> Config:
    """As on the H200: square images, rank-16 adapters on attention without dropout, bf16."""
    config = Config()
    config.model.base, config.model.family, config.model.resolution = base, family, side
    config.model.bucket_step, config.model.lora_targets, config.data.max_aspect = 64, ATTENTION, 1.0
    config.lora.rank, config.lora.dropout, config.trainer.micro_batch = 16, 0.0, 16
    config.hardware.device = Device.cuda
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "family", "side", "points"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd", 512, {4: 6.09, 16: 19.12}),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", 1024, {1: 12.83, 2: 20.13}),
    ],
    ids=["sd", "sdxl"],
)
def test_stable_diffusion_as_measured(base: str, family: str, side: int, points: dict[int, float]) -> None:
    candidates = Candidates(measured(base, family, side), GPU)
    for micro_batch, gib in points.items():
        assert candidates._step(micro_batch).peak.live / GIB == pytest.approx(gib, rel=0.12)


@pytest.mark.parametrize("quantize", list(Quantize), ids=lambda how: how.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_storage_is_traced(language_config: Config, quantize: Quantize, dtype: torch.dtype) -> None:
    language_config.model.quantize = quantize
    memory_model = kinds.memory_model(language_config, dtype, cuda=True, room=GIB)
    trace = memory_model.tracer.step(
        memory_model.model, lambda: memory_model.inputs(2), memory_model.forward, memory_model.loss
    )
    assert trace.peak.live > sum(trace.held.values())
    names = {kernel.name for kernel in trace.kernels}
    assert ("torch_attn._varlen_attn.default" in names) is (dtype is torch.bfloat16)  # masks in fp32


def test_settings_say_what_to_type() -> None:
    setting = Setting(4, 2, 1, False, False, 1.0, 8, {"weights": 1.0, "activations": 2.0})
    assert setting.gib == 3.0
    assert setting.overrides == ("trainer.micro_batch=4", "trainer.accumulate=2", "trainer.activation_checkpointing=1")
