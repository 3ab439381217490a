"""Presets of image models: each architecture is built without weights; adapters land where the preset says."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import finetune
from finetune.adapters import lora
from finetune.config import recipes
from finetune.config.schema import LoraConfig
from finetune.diffusion import families
from finetune.diffusion.families import family
from finetune.diffusion.objectives import Flow
from tests.presets import preset

pytestmark = pytest.mark.sampled
ARCHITECTURES = Path(finetune.__file__).parent / "architectures"
PRESETS = [
    name
    for name, file in recipes.preset_files()["model"].items()
    if "kind: diffusion" in file.read_text() and name != "embedded"
]
GIB = 1 << 30
# What VAE and patches or halvings need; sides of buckets are multiples of it.
STRIDES = {"sd": 64, "sdxl": 32}


def settings(name: str, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ARCHITECTURES / name / part).read_text())
    return found


def built(name: str, part: str, loader: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = loader.from_config(settings(name, f"{part}/config.json"))
    return model


@cache
def backbone(name: str) -> nn.Module:
    kind = family(preset(name).family)
    return built(name, kind.backbone, getattr(diffusers, kind.backbone_class))


def test_every_family_has_a_preset() -> None:
    assert {preset(name).family for name in PRESETS} == set(families.names())


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_index_names_its_base_and_its_familys_classes(name: str) -> None:
    found, index = preset(name), settings(name, "model_index.json")
    kind = family(found.family)
    assert (index["_class_name"], index["_name_or_path"]) == (kind.pipeline, found.base)
    assert found.parts == found.base  # which a file in its place leaves as it is
    assert index[kind.backbone][1] == kind.backbone_class
    assert index["vae"][1] == kind.vae_class
    assert set(kind.text_parts) <= set(index)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_as_many_as_the_presets_head_says(name: str) -> None:
    title = recipes.title(recipes.preset_files()["model"][name])
    weights = list(backbone(name).state_dict().values())
    parameters = sum(weight.numel() for weight in weights)
    said = re.search(r": ([\d.]+) B parameters, ([\d.]+) GiB in 16 bit", title)
    assert said, title
    digits = len(said[1].partition(".")[2])
    assert f"{parameters / 1e9:.{digits}f}" == said[1]
    assert f"{2 * parameters / GIB:.1f}" == said[2]


@pytest.mark.parametrize("name", PRESETS)
def test_parts_fit_one_another(name: str) -> None:
    import transformers

    found, config = preset(name), backbone(name).config
    kind = family(found.family)
    vae: Any = built(name, "vae", getattr(diffusers, kind.vae_class))
    channels = getattr(vae.config, "latent_channels", None) or vae.config.z_dim
    patched = 4 if found.family == "flux2" else 1  # its latents are patched before anything sees them
    assert kind.latent_channels(config) == patched * channels
    widths = []
    for part in kind.text_tokens:
        loader = getattr(transformers, settings(name, "model_index.json")[part][1])
        text = loader.config_class.from_pretrained(ARCHITECTURES / name / part).get_text_config()
        widths.append(text.hidden_size)
    wanted = {"sdxl": sum(widths), "flux2": 3 * widths[0]}.get(found.family, widths[-1])
    assert kind.text_shapes(config)["embedding"][1] == wanted
    scheduler = getattr(diffusers, settings(name, "model_index.json")["scheduler"][1])
    objective = kind.objective(scheduler.from_config(settings(name, "scheduler/scheduler_config.json")))
    latents = torch.zeros(kind.latent_channels(config), found.resolution // 16, found.resolution // 16)
    assert 0 <= objective.draw(torch.Generator().manual_seed(0), latents) <= 1000
    assert isinstance(objective, Flow) == (kind.backbone != "unet")


@pytest.mark.parametrize("name", PRESETS)
def test_buckets_are_multiples_of_what_the_model_can_take(name: str) -> None:
    found = preset(name)
    assert found.bucket_step % STRIDES.get(found.family, 16) == 0
    assert found.resolution % found.bucket_step == 0


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("targets", ["attention", "attention_ff", "wide"])
def test_every_target_gets_adapters_and_more_targets_get_more(name: str, targets: str) -> None:
    found = preset(name)
    assert list(found.lora_targets) == ["attention", "attention_ff", "wide"]
    layers = {
        key
        for key, module in backbone(name).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and any(key == end or key.endswith(f".{end}") for end in found.lora_targets[targets])
    }
    for end in found.lora_targets[targets]:
        assert any(layer.endswith(f".{end}") for layer in layers), end
    outside = {layer for layer in layers if not re.search(r"(blocks|layers|refiner)\.\d+\.|mid_block\.", layer)}
    assert outside <= {"proj_out"}  # the last layer of FLUX.1, called as one in its blocks
    attention = [layer for layer in layers if re.search(r"\.(attn\d?|attention)\.", layer)]
    if targets == "attention":
        assert len(attention) == len(layers) >= 60


@pytest.mark.parametrize("name", PRESETS)
def test_adapters_are_put_on_exactly_those_layers(name: str) -> None:
    found = preset(name)
    kind = family(found.family)
    model = built(name, kind.backbone, getattr(diffusers, kind.backbone_class)).requires_grad_(False)
    ends = found.lora_targets["wide"]
    wanted = {
        key for key, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(f".{key}".endswith(f".{end}") for end in ends)
    }  # fmt: skip
    with torch.device("meta"):
        lora.inject(model, LoraConfig(rank=1, alpha=1, dropout=0.0), ends, seed=0)
    adapted = {key.partition(".lora_A.")[0] for key, _ in model.named_parameters() if ".lora_A." in key}
    assert adapted == wanted
