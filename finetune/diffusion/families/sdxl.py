"""Stable Diffusion XL (arXiv 2307.01952)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.diffusion.families.spec import CLIP_TOKENS, BaseVersion, FamilySpec, Text

SIZES = 6  # numbers that tell the UNet of size and crop
VAE_FACTOR = 8


def encode(pipeline: Any, texts: Sequence[str]) -> Text:
    device = pipeline.text_encoder.device
    embedding_BLD, _, pooled_BD, _ = pipeline.encode_prompt(
        list(texts), device=device, do_classifier_free_guidance=False
    )
    return {"embedding": embedding_BLD, "pooled": pooled_BD}


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    pooled = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim
    return {"embedding": (CLIP_TOKENS, config.cross_attention_dim), "pooled": (pooled,)}


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    """The piece that was cut out counts as the whole image: what is drawn later then looks whole, not cropped."""
    height, width = (side * VAE_FACTOR for side in noisy_BChw.shape[-2:])
    sizes_B6 = torch.zeros(len(noisy_BChw), SIZES, dtype=text["pooled"].dtype, device=noisy_BChw.device)
    sizes_B6[:, 0::4], sizes_B6[:, 1::4] = height, width  # (height, width), its corner (0, 0), and its target's
    predicted_BChw: Tensor = model(
        noisy_BChw,
        timesteps_B,
        encoder_hidden_states=text["embedding"],
        added_cond_kwargs={"text_embeds": text["pooled"], "time_ids": sizes_B6},
        return_dict=False,
    )[0]
    return predicted_BChw


SPEC = FamilySpec(
    pipeline="StableDiffusionXLPipeline",
    unused={"feature_extractor": None, "image_encoder": None},
    backbone="unet",
    backbone_class="UNet2DConditionModel",
    text_tokens={"text_encoder": CLIP_TOKENS, "text_encoder_2": CLIP_TOKENS},
    kohya_prefix="lora_unet_",  # sd-scripts' names, which diffusers and ComfyUI read too
    diffusers_reads_kohya=True,
    base_version=lambda *_: BaseVersion("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    file_text_prefixes={"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."},
    decode_workspace_measured=True,
    encode=encode,
    text_shapes=text_shapes,
    predict=predict,
    capturable=True,
)
