"""CPU memory beside a GPU: what is loaded through it, waits in it, and is compared in it, counted by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from finetune import hub, kinds
from finetune.config.schema import Config, Device, ExportFormat, Optimizer, Precision, Quantize
from finetune.planning import host_memory
from finetune.planning.candidates import Candidates
from finetune.planning.machine import GIB, Machine
from finetune.planning.plan import Setting

pytestmark = pytest.mark.sampled
GPU = Machine("a GPU", True, 24.0, 0.5, True, 165.2, 82.6, 1008, 20.0, known=True)
FULL = 0.5  # GiB of a GPU whose context leaves no room for weights


@pytest.fixture(autouse=True)
def everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "LEAST_GIB", 1e-12)
    monkeypatch.setattr("finetune.memory.activation_offload.WORTH_BYTES", 0)


def on(config: Config, vram_gib: float = 24.0) -> Candidates:
    config.hardware.device, config.trainer.precision = Device.cuda, Precision.auto
    return Candidates(kinds.of(config).workload(config), replace(GPU, vram_gib=vram_gib))


def numbers(candidates: Candidates) -> int:
    """In the base, stored in 16 bit."""
    return sum(weight.numel() for weight in candidates.memory_model.model.parameters() if not weight.requires_grad)


def requested(candidates: Candidates, away: bool = False) -> Setting:
    return candidates.setting(2, 0, away)


def test_image_models_and_their_text_encoders_come_through_cpu_memory(config: Config) -> None:
    candidates = on(config)
    found = host_memory.peaks(candidates, requested(candidates))
    assert found.keys() == {"loading the base", "loading the text encoders", "export"}
    assert found["loading the base"] == found["export"] == 2 * numbers(candidates) / GIB
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_image_models_with_offloaded_blocks_are_compared_in_fp32(config: Config) -> None:
    config.model.offload = True
    candidates = on(config, FULL)
    found, blocks = host_memory.peaks(candidates, requested(candidates)), -candidates.held["weights"] / GIB
    assert found["training"] == blocks > 0
    assert found["loading the base"] == pytest.approx(2 * numbers(candidates) / GIB + blocks)
    everything = sum(weight.numel() for weight in candidates.memory_model.model.parameters())
    assert found["export"] == 2 * 4 * everything / GIB  # as it is loaded, and in its place


def test_what_diffusers_quantises_comes_through_cpu_memory_from_a_single_file_only(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.model.quantize = Quantize.nf4
    candidates = on(config)
    assert host_memory.peaks(candidates, requested(candidates)).keys() == {"loading the text encoders"}
    file = tmp_path / "base.safetensors"
    file.write_bytes(bytes(3000))
    monkeypatch.setattr(hub, "single_file", lambda _: file)
    found = host_memory.peaks(candidates, requested(candidates))
    assert found["loading the base"] == found["export"] == 3000 / GIB


@pytest.mark.parametrize(
    ("quantize", "dora", "formats", "bytes_of_a_number"),
    [
        (Quantize.none, False, [ExportFormat.peft], 4),
        (Quantize.nf4, False, [ExportFormat.peft], 0),
        (Quantize.nf4, False, [ExportFormat.peft, ExportFormat.merged], 4),
        (Quantize.none, True, [ExportFormat.peft], 0),
        (Quantize.none, True, [ExportFormat.peft, ExportFormat.merged], 2),
    ],
)
def test_language_models_go_to_the_gpu_at_once_and_are_compared_in_cpu_memory(
    language_config: Config, quantize: Quantize, dora: bool, formats: list[ExportFormat], bytes_of_a_number: int
) -> None:
    count = numbers(on(language_config))
    language_config.model.quantize, language_config.lora.dora = quantize, dora
    language_config.export.formats = formats
    candidates = on(language_config)
    found = host_memory.peaks(candidates, requested(candidates))
    assert found == ({"export": bytes_of_a_number * count / GIB} if bytes_of_a_number else {})


def test_an_export_that_the_gpu_is_too_small_for_is_counted(language_config: Config) -> None:
    language_config.export.formats = [ExportFormat.peft]
    language_config.model.quantize = Quantize.nf4
    candidates = on(language_config)
    assert host_memory.peaks(candidates, requested(candidates), {"sampling"}) == {}
    packed = sum(weight.nbytes for weight in candidates.memory_model.model.parameters())
    found = host_memory.peaks(candidates, requested(candidates), {"export"})
    assert found == {"export": 2 * packed / GIB}


def test_what_waits_in_training(language_config: Config) -> None:
    language_config.optim.name = Optimizer.paged_adamw8bit
    candidates = on(language_config)
    away = candidates.step(2, 0, away=True).away
    assert candidates.waiting(requested(candidates)) == {"optimiser": candidates.held["optimiser"] / GIB}
    waiting = candidates.waiting(requested(candidates, away=True))
    assert waiting["activations"] == pytest.approx(2 * away / GIB)  # pinned memory comes in powers of two
    assert host_memory.peaks(candidates, requested(candidates, away=True))["training"] == sum(waiting.values())
    language_config.model.offload = True
    candidates = on(language_config, FULL)
    found = host_memory.peaks(candidates, requested(candidates))
    assert found["loading the base"] == pytest.approx(
        2 * numbers(candidates) / GIB + candidates.waiting(requested(candidates))["blocks"]
    )


def test_without_a_gpu_the_plan_is_of_cpu_memory_already(language_config: Config) -> None:
    candidates = Candidates(kinds.of(language_config).workload(language_config), replace(GPU, cuda=False))
    assert host_memory.peaks(candidates, requested(candidates)) == {}


def advice(config: Config, name: str, free_gib: float | None = 16.0) -> str:
    """What the warning of that phase, of 46 GiB, suggests."""
    lines = list(host_memory.warning({name: 46.0, "training": 1.0}, free_gib, on(config)))
    assert all(f"{name} takes up to 46.0 GiB" in line for line in lines)
    return "".join(lines).rpartition("; ")[2]


def test_too_little_is_reported_with_what_to_type(language_config: Config) -> None:
    assert list(host_memory.warning({}, 1.0, on(language_config))) == []
    assert advice(language_config, "export", 46.0) == ""
    assert "where there is less, try model.quantize=nf4" in advice(language_config, "export", None)
    assert list(host_memory.warning({"export": 15.0}, None, on(language_config))) == []
    assert "model.quantize=nf4" in advice(language_config, "export")
    language_config.model.quantize = Quantize.nf4
    assert "close other programs" in advice(language_config, "export")
    language_config.export.formats = [ExportFormat.peft, ExportFormat.merged]
    assert "export.formats=[peft]" in advice(language_config, "export")


def test_text_encoders_are_not_quantised(config: Config) -> None:
    assert "model.quantize=nf4" in advice(config, "loading the base")
    assert "close other programs" in advice(config, "loading the text encoders")
