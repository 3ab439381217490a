"""A language model without weights, built from a configuration alone; no hub is asked."""

from typing import Any, cast

import torch
from torch import nn

from finetune import hub
from finetune.config.schema import LoraConfig, ModelConfig
from finetune.language import causal_lm
from finetune.language.task import inject
from finetune.planning.meta import on_meta


def download_bytes(model: ModelConfig, weights: int) -> dict[str, float]:
    """By hub id the bytes of a base of so many weights that aren't on this machine."""
    if not hub.to_download(model.base, ""):
        return {}
    config: Any = causal_lm.architecture(model, hub.config_folder(model.base))[1]
    return {model.base: float(weights * (config.dtype or torch.float32).itemsize)}


def language_model(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """What `causal_lm.load_model` loads, before it is quantised; new tokens included."""
    loader, config, options = causal_lm.architecture(model, hub.config_folder(model.base))
    config.dtype = dtype
    attention = options.get("attn_implementation", "sdpa")
    with hub.explained(lambda reason: f"the config.json of {model.base} describes no model ({reason}); get it again"):
        built: Any = on_meta(lambda: loader._from_config(config, attn_implementation=attention), dtype)
    if model.added_tokens:
        with torch.device("meta"):
            built.resize_token_embeddings(config.vocab_size + len(model.added_tokens), mean_resizing=False)
    return cast(nn.Module, built.requires_grad_(False))


def adapted(model: ModelConfig, lora: LoraConfig, dtype: torch.dtype, seed: int) -> nn.Module:
    """The same with adapters at their start."""
    built: Any = language_model(model, dtype)
    vocabulary = built.get_input_embeddings().weight.shape[0]
    new_tokens = range(vocabulary - len(model.added_tokens), vocabulary)  # the last ones
    return inject(built, model, lora, seed, new_tokens)
