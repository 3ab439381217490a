"""Models without weights: the same modules as loading gives, from configurations alone."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune import hub
from finetune.adapters import lora
from finetune.config.schema import LoraConfig, ModelConfig, Quantize
from finetune.diffusion import meta
from finetune.diffusion.pipeline import load_backbone, load_vae_model
from finetune.errors import ModelError
from finetune.language import causal_lm
from finetune.language import meta as language_meta
from finetune.planning import meta as planning_meta
from tests.tiny_language_models import save_language

MILLIONS = {  # of parameters, as the released models have them
    "llama31_8b": 8030.3, "llama2_7b": 6738.4, "qwen3_4b": 4022.5, "qwen3_8b": 8190.7, "mistral_7b": 7248.0,
    "gemma3_4b": 3880.3, "phi4_mini": 3836.0, "glm4_9b": 9400.3, "tinyllama_1b": 1100.0,
}  # fmt: skip


def shapes(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}


def base_of(name: str) -> str:
    return str(json.loads((hub.ARCHITECTURES / name / "config.json").read_text())["_name_or_path"])


def test_an_image_model_is_the_one_that_is_loaded(tiny_base: Path) -> None:
    model = ModelConfig(base=str(tiny_base))
    assert shapes(meta.backbone(model, torch.bfloat16)) == shapes(load_backbone(model, torch.bfloat16))
    assert shapes(meta.autoencoder(model)) == shapes(load_vae_model(model))
    assert all(parameter.is_meta for parameter in meta.backbone(model, torch.bfloat16).parameters())


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
def test_a_language_model_is_the_one_that_is_loaded(architecture: str, tmp_path: Path) -> None:
    model = ModelConfig(kind="language", base=str(save_language(tmp_path / architecture, architecture)))
    loaded = causal_lm.load_model(model, torch.float32, torch.device("cpu"))
    assert shapes(language_meta.language_model(model, torch.float32)) == shapes(loaded)


@pytest.mark.parametrize("name", MILLIONS)
def test_shipped_configurations_have_the_sizes_of_the_released_models(name: str) -> None:
    model = language_meta.language_model(ModelConfig(kind="language", base=base_of(name)), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.06)


def test_a_base_on_this_machine_wins_over_the_shipped_configuration(
    tiny_language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    base = base_of("llama31_8b")
    assert hub.config_folder(base) == hub.ARCHITECTURES / "llama31_8b"
    cached = tmp_path / ("models--" + base.replace("/", "--"))
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    snapshot = cached / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    # A download that was interrupted has no configuration.
    assert hub.config_folder(base) == hub.ARCHITECTURES / "llama31_8b"
    (snapshot / "config.json").write_text((tiny_language / "config.json").read_text())
    assert hub.config_folder(base) == snapshot


def test_an_unknown_base_is_reported_with_what_to_type() -> None:
    with pytest.raises(ModelError, match=r"somebody/something .* hf download somebody/something"):
        hub.config_folder("somebody/something")


@pytest.mark.parametrize(
    ("how", "bytes_a_weight"), [(Quantize.nf4, 0.5159), (Quantize.int8, 1 + 4 / 4096)], ids=["nf4", "int8"]
)
def test_quantised_layers_take_what_bitsandbytes_stores(how: Quantize, bytes_a_weight: float) -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4096, 4096, bias=False), "head": nn.Linear(4096, 8, bias=False)}).to(
        "meta"
    )
    model.requires_grad_(False)
    lora.inject(model, LoraConfig(rank=4, alpha=8, dropout=0.0), ["q_proj"], seed=0)
    before = {name: weight.nbytes for name, weight in model.named_parameters() if "base_layer" not in name}
    planning_meta.quantised(model, how, model["head"])
    stored = next(weight for name, weight in model.named_parameters() if "base_layer" in name)
    assert stored.nbytes == pytest.approx(4096 * 4096 * bytes_a_weight, rel=1e-3)
    assert {name: weight.nbytes for name, weight in model.named_parameters() if "base_layer" not in name} == before
