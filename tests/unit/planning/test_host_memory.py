"""CPU memory beside a GPU: what is loaded through it, waits in it, and is compared there, counted by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from finetune import hub
from finetune.config.schema import Config, Device, ExportFormat, Optimizer, Precision, Quantize
from finetune.planning import host_memory
from finetune.planning.candidates import Candidates
from finetune.planning.machine import GIB, Machine
from finetune.planning.plan import Setting

GPU = Machine("a GPU", True, 24.0, 0.5, True, 165.2, 82.6, 1008, 20.0, known=True)
FULL = 0.5  # GiB of a GPU whose context leaves no room for weights


@pytest.fixture(autouse=True)
def everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "LEAST_GIB", 1e-12)
    monkeypatch.setattr("finetune.memory.activation_offload.WORTH_BYTES", 0)


def on(config: Config, vram_gib: float = 24.0) -> Candidates:
    config.hardware.device, config.trainer.precision = Device.cuda, Precision.auto
    return Candidates(config, replace(GPU, vram_gib=vram_gib))


def numbers(candidates: Candidates) -> int:
    """In the base, stored in 16 bit."""
    return sum(weight.numel() for weight in candidates.memory_model.model.parameters() if not weight.requires_grad)


def requested(candidates: Candidates, away: bool = False) -> Setting:
    return candidates.setting(2, 0, away)


def test_pictures_come_through_main_memory_and_so_do_their_text_encoders(config: Config) -> None:
    candidates = on(config)
    found = host_memory.peaks(config, candidates, requested(candidates))
    assert found.keys() == {"loading the base", "loading the text encoders", "export"}
    assert found["loading the base"] == found["export"] == 2 * numbers(candidates) / GIB
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_pictures_whose_blocks_stay_are_compared_in_fp32(config: Config) -> None:
    config.model.offload = True
    candidates = on(config, FULL)
    found, blocks = host_memory.peaks(config, candidates, requested(candidates)), -candidates.held["weights"] / GIB
    assert found["training"] == blocks > 0
    assert found["loading the base"] == pytest.approx(2 * numbers(candidates) / GIB + blocks)
    everything = sum(weight.numel() for weight in candidates.memory_model.model.parameters())
    assert found["export"] == 2 * 4 * everything / GIB  # as it is loaded, and in its place


def test_what_diffusers_quantises_comes_through_main_memory_from_a_single_file_only(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.model.quantize = Quantize.nf4
    candidates = on(config)
    assert host_memory.peaks(config, candidates, requested(candidates)).keys() == {"loading the text encoders"}
    file = tmp_path / "base.safetensors"
    file.write_bytes(bytes(3000))
    monkeypatch.setattr(hub, "single_file", lambda _: file)
    found = host_memory._loading(candidates)
    assert found == host_memory._export(candidates) == 3000 / GIB


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
def test_language_models_go_to_the_card_at_once_and_are_compared_in_main_memory(
    language_config: Config, quantize: Quantize, dora: bool, formats: list[ExportFormat], bytes_of_a_number: int
) -> None:
    count = numbers(on(language_config))
    language_config.model.quantize, language_config.lora.dora = quantize, dora
    language_config.export.formats = formats
    candidates = on(language_config)
    found = host_memory.peaks(language_config, candidates, requested(candidates))
    assert found == ({"export": bytes_of_a_number * count / GIB} if bytes_of_a_number else {})


def test_an_export_that_the_card_is_too_small_for_is_counted_here(language_config: Config) -> None:
    language_config.export.formats = [ExportFormat.peft]
    language_config.model.quantize = Quantize.nf4
    candidates = on(language_config)
    assert host_memory.peaks(language_config, candidates, requested(candidates), {"sampling"}) == {}
    packed = sum(weight.nbytes for weight in candidates.memory_model.model.parameters())
    found = host_memory.peaks(language_config, candidates, requested(candidates), {"export"})
    assert found == {"export": 2 * packed / GIB}


def test_what_waits_in_training(language_config: Config) -> None:
    language_config.optim.name = Optimizer.paged_adamw8bit
    candidates = on(language_config)
    away = candidates.step(2, 0, away=True).away
    assert candidates.waiting(requested(candidates)) == {"optimiser": candidates.held["optimiser"] / GIB}
    waiting = candidates.waiting(requested(candidates, away=True))
    assert waiting["activations"] == pytest.approx(2 * away / GIB)  # pinned memory comes in powers of two
    assert host_memory.peaks(language_config, candidates, requested(candidates, away=True))["training"] == sum(
        waiting.values()
    )
    language_config.model.offload = True
    candidates = on(language_config, FULL)
    found = host_memory.peaks(language_config, candidates, requested(candidates))
    assert found["loading the base"] == pytest.approx(
        2 * numbers(candidates) / GIB + candidates.waiting(requested(candidates))["blocks"]
    )


def test_without_a_card_the_plan_is_of_main_memory_already(language_config: Config) -> None:
    candidates = Candidates(language_config, replace(GPU, cuda=False))
    assert host_memory.peaks(language_config, candidates, requested(candidates)) == {}


def test_too_little_is_said_with_what_to_type(language_config: Config) -> None:
    def said(name: str, free_gib: float | None = 16.0) -> str:
        return "\n".join(host_memory.warning(language_config, {name: 46.0, "training": 1.0}, free_gib))

    assert said("export", None) == said("export", 46.0) == ""
    assert list(host_memory.warning(language_config, {}, 1.0)) == []
    language_config.model.quantize = Quantize.nf4
    head = "CPU memory: export takes up to 46.0 GiB, and 16.0 are free here now; "
    assert said("export") == f"{head}close other programs first"
    language_config.export.formats = [ExportFormat.peft, ExportFormat.merged]
    assert said("export") == f"{head}try 'export.formats=[peft]'"
    language_config.model.quantize = Quantize.none
    assert said("loading the base").endswith("here now; try model.quantize=nf4")
    assert said("loading the text encoders").endswith("here now; close other programs first")
