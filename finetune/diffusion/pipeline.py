"""The parts of a latent diffusion model, each loaded when its phase needs it and dropped after.

What the families differ in is in `finetune.diffusion.families`.

B images, 3 colours, C latent channels, H×W pixels, h×w latent pixels, L text tokens, D text width.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune import hub
from finetune.adapters import attach, formats, lora
from finetune.config.schema import ModelConfig, Quantize
from finetune.diffusion import single_file
from finetune.diffusion.families import family
from finetune.diffusion.families.spec import FamilySpec, Text
from finetune.errors import ModelError, is_gpu_out_of_memory
from finetune.memory import block_offload, policy, quantize
from finetune.memory.device import release_memory
from finetune.memory.fallbacks import AdaptiveBatch, try_within_memory
from finetune.run import libraries
from finetune.run.progress import say

CPU = torch.device("cpu")
PROOF_SIDE = 16  # latent pixels of a backbone's first pass
ADAPTER_FILE = formats.DIFFUSERS_WEIGHTS


class TextEncoder:
    """A base's frozen text encoders with their tokenizers.

    Where they don't fit the GPU they read fewer captions at once, and at last work in CPU memory, which is slower.
    """

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        """Raises ModelError."""
        self.family, self.base = family(model.family), model.base
        self.adaptive_batch = AdaptiveBatch(self.family.captions_per_pass, self._move_to_cpu)
        large = dict.fromkeys(self.family.large_text, policy.text_encoder_dtype(large=True))
        dtypes = {"default": policy.text_encoder_dtype(large=False)} | large
        parts = dict.fromkeys((self.family.backbone, "vae"))
        self.pipeline = load_pipeline(model, parts, torch_dtype=dtypes)
        if try_within_memory(lambda: self.pipeline.to(device), is_oom=is_gpu_out_of_memory) is None:
            self.adaptive_batch.fallbacks.pop()()

    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Per text what the backbone reads, on the CPU; longer texts are cut to what the encoders read."""
        return self.adaptive_batch.each(self._read, texts)

    @torch.no_grad()
    def _read(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        # The libraries warn of each text that is cut; so do we, once and by file.
        with libraries.without_warnings(), first_use(self.base, "text encoders and tokenizers"):
            stacked = self.family.encode(self.pipeline, texts)
        kept = {name: values.cpu() for name, values in stacked.items()}
        return [{name: values[index].contiguous() for name, values in kept.items()} for index in range(len(texts))]

    def _move_to_cpu(self) -> None:
        say("the text encoders don't fit the GPU: they work in CPU memory, which is slower")
        self.pipeline.to("cpu")
        release_memory()

    def truncated_tail(self, text: str) -> str:
        """The tail of `text` that the encoder never sees; empty if all of it fits."""
        tokenizer, limit = self.family.tokenizer_and_limit(self.pipeline)
        room = limit - tokenizer.num_special_tokens_to_add()
        with first_use(self.base, "tokenizer"):
            ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
            return str(tokenizer.decode(ids[room:])).strip() if len(ids) > room else ""


class Vae:
    """A frozen autoencoder; its latents are shifted and scaled as the backbone wants them."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        """Raises ModelError."""
        self.family, self.base, self.device = family(model.family), model.base, device
        self.model = load_vae_model(model).to(device)

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor) -> list[dict[str, Tensor]]:
        """Per image (values in -1 … 1) `{"mean", "std"}`, each (C, h, w) fp32 on the CPU.

        Training draws new latents from them in each epoch.
        """
        with first_use(self.base, "autoencoder"):
            mean_BChw, std_BChw = self.family.moments(self.model, pixels_B3HW.to(self.device))
        return [
            {"mean": mean.contiguous(), "std": std.contiguous()}
            for mean, std in zip(mean_BChw.float().cpu(), std_BChw.float().cpu(), strict=True)
        ]


def first_use(base: str, parts: str) -> AbstractContextManager[None]:
    """Around the first use of parts: damaged configurations load, and show when they are used."""
    return hub.explained(
        lambda reason: (
            f"the {parts} of {base} failed ({reason}); its files may be damaged or of different models: get them again"
        )
    )


@torch.no_grad()
def prove_backbone(
    model: ModelConfig, backbone: Any, latents_1Chw: Tensor, text: Text, device: torch.device, dtype: torch.dtype
) -> None:
    """One small pass with latents and a stacked caption of the base's own other parts, before anything is trained.

    Raises ModelError if its configuration is damaged, or parts are of different models.
    """
    spec = family(model.family)
    latents_1Chw = latents_1Chw[..., :PROOF_SIDE, :PROOF_SIDE].to(device)
    text = {name: value.to(device, dtype) for name, value in text.items()}
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
    with first_use(model.base, spec.backbone), autocast:
        spec.predict(backbone, latents_1Chw, torch.full((1,), 500, device=device), text)


def base_hash(model: ModelConfig, *parts: str) -> str:
    """Hash of the base's weights and configuration; parts as for `hub.content_hash`. Raises ModelError."""
    found = single_file.find(model)
    return hub.content_hash(model.base, *parts) if found is None else single_file.content_hash(found, *parts)


def text_encoder_hash(model: ModelConfig) -> str:
    """Identity of the text encoders for cache keys, known without loading them."""
    return base_hash(model, "text_encoder*", "tokenizer*")


def vae_hash(model: ModelConfig) -> str:
    """Identity of the autoencoder for cache keys, known without loading it."""
    return base_hash(model, "vae")


def load_vae_model(model: ModelConfig) -> nn.Module:
    """The base's frozen autoencoder on the CPU. Raises ModelError."""
    loader = _class(family(model.family).vae_class)
    vae: nn.Module = _load(loader, model, "vae", torch_dtype=policy.VAE_DTYPE)
    return vae.eval().requires_grad_(False)


def load_backbone(
    model: ModelConfig, dtype: torch.dtype, device: torch.device = CPU, *, vram_gib: float = 0.0
) -> nn.Module:
    """The base's frozen UNet or transformer, stored and placed as `model` says.

    dtype: of weights that aren't quantised, and of the arithmetic of those that are. vram_gib: memory of the GPU, GiB,
    that `model.offload` fills before it keeps blocks in CPU memory; 0 is all of it. Raises ModelError.
    """
    spec = family(model.family)
    options: dict[str, Any] = {"torch_dtype": dtype}
    if model.quantize is not Quantize.none:
        from diffusers import BitsAndBytesConfig

        quantize.prove(model, dtype, device)
        settings = BitsAndBytesConfig(**quantize.settings(model.quantize, dtype))
        options |= {"quantization_config": settings, "device_map": {"": device}}
    loader = _class(spec.backbone_class)
    backbone: nn.Module = _load(loader, model, spec.backbone, **options)
    backbone.requires_grad_(False)
    quantize.prepare(backbone)
    if block_offload.is_active(model, device):
        block_offload.offload_to_fit(backbone, device, vram_gib)
        return backbone
    return backbone if model.quantize is not Quantize.none else backbone.to(device)


def load_scheduler(model: ModelConfig) -> Any:
    """The base's noise scheduler, with its own prediction type and noise levels."""
    spec = family(model.family)
    return load_pipeline(model, dict.fromkeys(spec.parts)).scheduler


def load_pipeline(model: ModelConfig, parts: dict[str, Any], **options: Any) -> Any:
    """The base's pipeline with `parts` in place of its own; what is None there isn't loaded. Raises ModelError.

    Its class finds the scheduler's by itself, and whatever else the base's model_index.json sets.
    """
    spec, source = family(model.family), model.base
    found = single_file.find(model)
    if found is not None:
        source = str(found.settings)
        parts = single_file.complete(found, parts, options.pop("torch_dtype", {"default": torch.float32}))
    index = hub.model_index(source)
    if index and index["_class_name"] != spec.pipeline:
        raise ModelError(
            f"{source} is a {index['_class_name']}, and model.family={model.family} needs a {spec.pipeline}; "
            "choose the preset of its family, such as model=sdxl, and set model.base besides"
        )
    pipeline = hub.load(_class(spec.pipeline), source, **parts, **spec.unused, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_adapter(
    model: ModelConfig, backbone: Any, folder: Path, weights: Mapping[str, Tensor], name: str = ADAPTER_FILE
) -> Path:
    """Write `name`, which `pipeline.load_lora_weights` reads.

    The strength is within B, and alpha is the rank: readers that know no metadata apply alpha / r = 1.
    """
    spec = family(model.family)
    folder.mkdir(parents=True, exist_ok=True)
    # What diffusers adds to a pipeline stays in training mode: a dropout would be at work in every image. It goes by
    # the names in the file, and warns of exclusions that exclude none of those.
    config = backbone.peft_config[lora.ADAPTER].to_dict()
    settings = config | {"lora_dropout": 0.0, "exclude_modules": None, "lora_alpha": config["r"]}
    settings["target_modules"] = sorted(config["target_modules"])
    scaled = dict(weights)
    for layer_name, layer in lora.lora_layers(backbone):
        scaled[f"{layer_name}.lora_B.weight"] = weights[f"{layer_name}.lora_B.weight"] * layer.scaling[lora.ADAPTER]
    _class(spec.pipeline).save_lora_weights(
        folder,
        # PEFT's names for every layer: diffusers' converter renames only some, and its loader judges by the first
        **{
            f"{spec.backbone}_lora_layers": scaled,
            f"{spec.backbone}_lora_adapter_metadata": settings,
        },
        weight_name=name,
    )
    formats.sort_metadata(folder / name)
    return folder / name


def load_adapter(model: ModelConfig, backbone: Any, path: Path) -> nn.Module:
    """The backbone with an adapter in any format: a PEFT folder, or a diffusers or kohya-style safetensors file.

    Raises ModelError if the adapter is missing, damaged, or made for another base.
    """
    attach.require_adapter(path)
    path = _located(path)
    if path.is_dir():
        return cast(nn.Module, attach.attach_peft_folder(backbone, path).get_base_model())
    with attach.mismatch_as_model_error(path):
        if any(".lokr_" in key for key in formats.read_weights(path)):
            with libraries.without_warnings():
                _load_lokr(model, backbone, path)
        else:
            stored = read_adapter(model, backbone, path)
            say_unused(path, stored)
            backbone.load_lora_adapter(stored.weights, prefix=None)
    attach.move_adapters_to_gpu(backbone)
    return cast(nn.Module, backbone.eval())


def read_adapter(model: ModelConfig, backbone: Any, path: Path) -> formats.StoredAdapter:
    """An adapter in any format for this backbone, which may have adapters already, and may be on `meta`.

    Raises ModelError if it is missing, damaged, or has no layer of this base.
    """
    path = _located(path)
    if not path.is_file():
        return formats.read_peft(path)
    spec = family(model.family)
    layers = [name for name, module in backbone.named_modules() if hasattr(module, "weight")]
    with attach.mismatch_as_model_error(path), libraries.without_warnings():
        stored = formats.read_file(path, spec.backbone, layers, lambda foreign: _converted(spec, backbone, foreign))
    if not stored.weights:
        raise attach.mismatch(path, stored.describe_unused() or "it holds nothing")
    return stored


def say_unused(path: Path, stored: formats.StoredAdapter) -> None:
    """Say what an adapter's file holds besides."""
    if stored.unused:
        say(f"{path}: not used: {stored.describe_unused()}")


def _located(path: Path) -> Path:
    """The PEFT folder or the single file that `path` stands for."""
    folder = formats.peft_folder(path)
    return folder / ADAPTER_FILE if (folder / ADAPTER_FILE).exists() else folder


def _converted(spec: FamilySpec, backbone: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers under diffusers' names, from any of the forms that diffusers knows for this family."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    shape = {"unet_config": backbone.config} if spec.backbone == "unet" else {}
    found = _class(spec.pipeline).lora_state_dict(tensors, **shape)
    found = found[0] if isinstance(found, tuple) else found
    return dict(convert_unet_state_dict_to_peft(found)) if shape else dict(found)


def _load_lokr(model: ModelConfig, backbone: Any, path: Path) -> None:
    """A LoKr (arXiv 2309.14859), where diffusers knows its names; its factors have no A and B."""
    spec = family(model.family)
    found = _class(spec.pipeline).lora_state_dict(str(path), return_lora_metadata=True)
    layers = {f"{spec.backbone}.{name}" for name, _ in backbone.named_modules()}
    used = {key: factor for key, factor in found[0].items() if key.partition(".lokr_")[0] in layers}
    stored = formats.StoredAdapter(used, {}, tuple(sorted(found[0].keys() - used.keys())))
    if not used:
        raise attach.mismatch(path, stored.describe_unused())
    backbone.load_lora_adapter(used, prefix=spec.backbone, metadata=found[-1])
    say_unused(path, stored)


def _load(loader: Any, model: ModelConfig, part: str, **options: Any) -> Any:
    """A part of the base, wherever that is. Raises ModelError."""
    found = single_file.find(model)
    if found is None:
        return hub.load(loader, model.base, subfolder=part, **options)
    return single_file.load(loader, found, part, **options)


def _class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)
