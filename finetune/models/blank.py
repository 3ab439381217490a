"""Base models without weights: every tensor on torch's `meta` device, built from a configuration alone.

The configuration is the base's own where the base is on disk, else the one in `architectures/` for that base. No hub is
asked.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.config import ModelConfig, Quantize
from finetune.errors import ModelError
from finetune.models import hub, language
from finetune.models.families import family
from finetune.models.objectives import Objective

ARCHITECTURES = Path(__file__).parent / "architectures"
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: 4 bits, a scale in 8 bits for 64 weights, and a scale in fp32 for 256 of those (arXiv 2305.14314,
§3, with bitsandbytes' block sizes)."""


def folder(base: str) -> Path:
    """The folder with the base's configuration. Raises ModelError if there is none on this machine."""
    found = hub.local(base)
    if found is not None and _index(found).is_file():
        return found
    for shipped in sorted(ARCHITECTURES.iterdir()):
        if shipped.is_dir() and json.loads(_index(shipped).read_text())["_name_or_path"] == base.split("@")[0]:
            return shipped
    raise ModelError(
        f"the configuration of {base} is neither on this machine nor in the package, so its memory can't be planned; "
        f"type: hf download {base} --include '*.json', or name a local folder as model.base"
    )


def _settings(model: ModelConfig) -> Path:
    """The folder with the configuration of a picture model's parts, or of a language model."""
    return folder(model.base if hub.single_file(model.base) is None else model.parts or model.base)


def backbone(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """What `diffusion.load_backbone` loads."""
    kind = family(model.family)
    return _diffusers_part(model, kind.BACKBONE, kind.BACKBONE_CLASS, dtype)


def autoencoder(model: ModelConfig) -> nn.Module:
    """What `diffusion.load_vae_model` loads."""
    return _diffusers_part(model, "vae", family(model.family).VAE_CLASS, torch.float32).eval()


def text_encoders(model: ModelConfig) -> nn.ModuleList:
    """The text encoders of a picture model, in the dtypes that `diffusion.TextEncoder` gives them."""
    import transformers

    found, kind = _settings(model), family(model.family)
    index = json.loads(_index(found).read_text())
    encoders = nn.ModuleList()
    for part in kind.TEXT:
        if (found / part / "config.json").is_file() and "tokenizer" not in part:
            loader: Any = getattr(transformers, index[part][1])
            config = loader.config_class.from_pretrained(found / part)
            dtype = torch.bfloat16 if part in kind.LARGE_TEXT else torch.float32
            encoders.append(_on_meta(partial(loader, config), dtype).eval())
    return encoders


def objective(model: ModelConfig) -> Objective:
    """What the base's backbone learns, with the noise levels of its scheduler."""
    import diffusers

    settings = json.loads((_settings(model) / "scheduler" / "scheduler_config.json").read_text())
    # Inputs of another solver have the same shapes, and only this one makes them without looking at its timesteps.
    flow = "Flow" in settings["_class_name"]
    scheduler: Any = getattr(diffusers, settings["_class_name"] if flow else "DDPMScheduler")
    return family(model.family).objective(scheduler.from_config(settings))


def language_model(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """What `language.load_model` loads, before it is quantised; new tokens included."""
    loader, config, options = language.architecture(model, _settings(model))
    config.dtype = dtype
    built: Any = _on_meta(
        lambda: loader._from_config(config, attn_implementation=options.get("attn_implementation", "sdpa")), dtype
    )
    if model.added_tokens:
        with torch.device("meta"):
            built.resize_token_embeddings(config.vocab_size + len(model.added_tokens), mean_resizing=False)
    return cast(nn.Module, built.requires_grad_(False))


def captioner(reference: str, dtype: torch.dtype) -> nn.Module:
    """What `captioner.Captioner` loads."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    config = BlipConfig.from_pretrained(folder(reference))
    return _on_meta(lambda: BlipForConditionalGeneration(config), dtype).eval()


def quantised(model: nn.Module, how: Quantize, head: nn.Module | None = None) -> nn.Module:
    """The model with its frozen linear layers, `head` excepted, stored as bitsandbytes stores them; adapters stay.

    Layers compute as bitsandbytes' do, as far as memory goes: each product makes a copy of its weights in the dtype of
    the arithmetic and drops it, in backward as well.
    """
    for layer in cast(Iterator[Any], model.modules()):
        if type(layer) is nn.Linear and layer is not head and not layer.weight.requires_grad:
            size = _stored(layer.weight, how)
            shape = layer.weight.shape
            layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
            cast(Any, layer).forward = _quantised_forward(layer, shape, how)
        elif hasattr(layer, "lora_A"):
            layer.cast_input_dtype_enabled = False  # PEFT's layers over bitsandbytes' leave the cast to autocast
    return model


def _stored(weight: Tensor, how: Quantize) -> int:
    """Bytes of a quantised weight (O, I): nf4, or int8 with an fp32 scale a row."""
    return round(NF4_BYTES * weight.numel()) if how is Quantize.nf4 else weight.numel() + 4 * weight.shape[0]


def _quantised_forward(layer: nn.Linear, shape: torch.Size, how: Quantize) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs.dtype
        product: Tensor = _Product.apply(inputs.to(dtype), shape, how is Quantize.int8)  # type: ignore[no-untyped-call]
        return product if layer.bias is None else product + layer.bias.to(dtype)

    return forward


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, shape: torch.Size, int8: bool) -> Tensor:
        ctx.shape = shape
        ctx.kept = inputs if int8 else None  # past autograd (bitsandbytes MatMul8bitLt): recomputing doesn't free it
        return nn.functional.linear(inputs, inputs.new_empty(shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream @ upstream.new_empty(ctx.shape), None, None


def _diffusers_part(model: ModelConfig, part: str, loader: str, dtype: torch.dtype) -> nn.Module:
    import diffusers

    built: Any = getattr(diffusers, loader)
    config = built.load_config(_settings(model) / part)
    return _on_meta(lambda: built.from_config(config), dtype)


def _on_meta(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        module = build()
    # Past what diffusers makes of `to`, which warns
    return nn.Module.to(module, dtype).requires_grad_(False)


def _index(found: Path) -> Path:
    index = found / "model_index.json"
    return index if index.is_file() else found / "config.json"
