"""The parts of a latent diffusion model without weights, built from configurations alone; no hub is asked."""

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune import hub
from finetune.adapters import lora as lora_layers
from finetune.config.schema import LoraConfig, ModelConfig
from finetune.diffusion.families import family
from finetune.diffusion.objectives import Objective
from finetune.errors import ModelError
from finetune.memory import policy
from finetune.planning.meta import on_meta


def backbone(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """What `pipeline.load_backbone` loads."""
    spec = family(model.family)
    return _diffusers_part(model, spec.backbone, spec.backbone_class, dtype)


def adapted(model: ModelConfig, lora: LoraConfig, dtype: torch.dtype, seed: int) -> nn.Module:
    """The backbone with adapters at their start."""
    return lora_layers.inject(backbone(model, dtype), lora, model.lora_targets[lora.targets], seed=seed)


def autoencoder(model: ModelConfig) -> nn.Module:
    """What `pipeline.load_vae_model` loads."""
    return _diffusers_part(model, "vae", family(model.family).vae_class, policy.VAE_DTYPE).eval()


def text_encoders(model: ModelConfig) -> nn.ModuleDict:
    """The text encoders of an image model by part, in the dtypes that `pipeline.TextEncoder` gives them."""
    import transformers

    found, spec = _config_folder(model), family(model.family)
    index = hub.read_object(found / "model_index.json")
    encoders = nn.ModuleDict()
    for part in spec.text_tokens:
        if (found / part / "config.json").is_file():
            dtype = policy.text_encoder_dtype(large=part in spec.large_text)
            with _explained(found / part):
                loader: Any = getattr(transformers, index[part][1])
                config = loader.config_class.from_pretrained(found / part)
                encoders[part] = on_meta(partial(loader, config), dtype).eval()
    if not encoders:
        raise ModelError(f"{found} has no text encoder ({', '.join(spec.text_tokens)}); get the base again")
    return encoders


def parts(model: ModelConfig) -> tuple[str, ...]:
    """Parts with weights, as far as the configuration is on this machine: a base may do without a text encoder."""
    found, spec = hub.known_config(model.base), family(model.family)
    texts = (part for part in spec.text_tokens if found and (found / part / "config.json").is_file())
    return spec.backbone, "vae", *texts


def download_bytes(model: ModelConfig) -> dict[str, float]:
    """By hub id the bytes of parts that aren't on this machine, as they are released; nothing of a single file."""
    if hub.single_file(model.base) is not None:
        return {}
    lacking = hub.to_download(model.base, *parts(model))
    if not lacking:
        return {}
    index = hub.read_object(_config_folder(model) / "model_index.json")
    dtype = policy.VAE_DTYPE if index.get("_dtype") == "float32" else torch.bfloat16
    built = dict(text_encoders(model).named_children())
    built |= {family(model.family).backbone: backbone(model, dtype), "vae": autoencoder(model)}
    return {model.base: float(sum(w.nbytes for part in lacking for w in built[part].to(dtype).parameters()))}


def objective(model: ModelConfig) -> Objective:
    """What the base's backbone learns, with the noise levels of its scheduler."""
    import diffusers

    file = _config_folder(model) / "scheduler" / "scheduler_config.json"
    with _explained(file):
        settings = hub.read_object(file)
        # Inputs of another solver have the same shapes, and only this one makes them without looking at its timesteps.
        flow = "Flow" in settings["_class_name"]
        scheduler: Any = getattr(diffusers, settings["_class_name"] if flow else "DDPMScheduler")
        return family(model.family).objective(scheduler.from_config(settings))


def _config_folder(model: ModelConfig) -> Path:
    """The folder with the configuration of an image model's parts."""
    return hub.config_folder(model.base if hub.single_file(model.base) is None else model.parts or model.base)


def _diffusers_part(model: ModelConfig, part: str, loader: str, dtype: torch.dtype) -> nn.Module:
    import diffusers

    built: Any = getattr(diffusers, loader)
    folder = _config_folder(model) / part
    with _explained(folder):
        config = built.load_config(folder)
        return on_meta(lambda: built.from_config(config), dtype)


def _explained(path: Path) -> AbstractContextManager[None]:
    return hub.explained(lambda reason: f"{path} describes no part that can be built ({reason}); get it again")
