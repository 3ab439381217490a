"""Presets of language models: adapters land where each says and train, on a tiny model of the same architecture."""

from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.adapters import lora
from finetune.config import recipes
from finetune.config.schema import LoraConfig, ModelConfig, Quantize
from finetune.language import causal_lm
from finetune.language.losses import summed_cross_entropy
from tests.presets import preset
from tests.tiny_language_models import save_language

torch.set_num_threads(1)

ARCHITECTURES = {
    "embedded_language": "llama",
    "llama2_7b": "llama2",
    "llama2_13b": "llama2",
    "llama31_8b": "llama",
    "qwen3_4b": "qwen3",
    "qwen3_8b": "qwen3",
    "mistral_7b": "mistral",
    "gemma3_4b": "gemma3",
    "phi4_mini": "phi3",
    "glm4_9b": "glm4",
    "tinyllama_1b": "tinyllama",
}


def tiny(name: str, folder: Path, quantize: Quantize = Quantize.none) -> nn.Module:
    own = preset(name).base
    base = own if own.startswith("embedded:") else str(save_language(folder, ARCHITECTURES[name]))
    config = ModelConfig(kind="language", base=base, quantize=quantize)
    return causal_lm.load_model(config, torch.float32, torch.device("cpu"))


def linear_layers(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)} - {"lm_head"}


def test_every_language_preset_is_tested_here() -> None:
    assert {name for name in recipes.preset_files()["model"] if preset(name).kind == "language"} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_preset_names_a_base_that_needs_no_more_words(name: str) -> None:
    found = preset(name)
    assert found.base == "embedded:language" or found.base.count("/") == 1
    assert recipes.title(recipes.preset_files()["model"][name]).endswith(".")
    large = any(size in name for size in ("7b", "8b", "9b", "13b"))
    assert found.quantize is (Quantize.nf4 if large else Quantize.none)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_is_every_linear_layer_but_the_head(name: str, tmp_path: Path) -> None:
    layers = linear_layers(tiny(name, tmp_path))
    targets = preset(name).lora_targets
    assert set(targets) == {"attention", "all_linear"}
    matched = {which: {layer for layer in layers if layer.endswith(tuple(f".{end}" for end in ends))}
               for which, ends in targets.items()}  # fmt: skip
    assert matched["all_linear"] == layers
    assert matched["attention"] == {layer for layer in layers if ".self_attn." in layer}
    for ends in targets.values():
        assert all(any(layer.endswith(f".{end}") for layer in layers) for end in ends)


@pytest.mark.sampled
@pytest.mark.parametrize("targets", ["attention", "all_linear"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_adapter_of_a_preset_gets_a_gradient(name: str, targets: str, tmp_path: Path) -> None:
    found = preset(name)
    model = tiny(name, tmp_path, found.quantize)
    adapted = len(linear_layers(model)) if targets == "all_linear" else None
    lora.inject(model, LoraConfig(rank=4, alpha=8, dropout=0.05), found.lora_targets[targets], seed=0).train()
    parameters = dict(lora.trainable_tensors(model))
    assert adapted is None or len(parameters) == 2 * adapted
    for parameter in lora.adapter_parameters(model):
        parameter.data += 0.1  # B starts at zero, and A's gradient with it
    tokenizer = causal_lm.load_tokenizer(model.name_or_path)
    turns = [{"role": "user", "content": "What is the colour of the sky?"}, {"role": "assistant", "content": "Blue."}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    ids_1L = torch.tensor([ids])
    states_1LD = causal_lm.packed_hidden_states(
        model, ids_1L, torch.arange(len(ids))[None], torch.zeros(1, len(ids), dtype=torch.int32)
    )
    loss = summed_cross_entropy(states_1LD[0, :-1], causal_lm.head(model), ids_1L[0, 1:])
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in lora.adapter_parameters(model))
