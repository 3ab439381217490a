"""Stable Diffusion XL (arXiv 2307.01952)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.diffusion.families.base import Text, decode_kl, identity_layout, kl_moments, pooled_call
from finetune.diffusion.objectives import Denoising, Objective

PIPELINE = "StableDiffusionXLPipeline"
BACKBONE, BACKBONE_CLASS, VAE_CLASS = "unet", "UNet2DConditionModel", "AutoencoderKL"
TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
UNUSED = {"feature_extractor": None, "image_encoder": None}
LARGE_TEXT: tuple[str, ...] = ()
KOHYA = "lora_unet_"  # sd-scripts' names, which diffusers and ComfyUI read too
FILE_TEXT = {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."}
TEXT_TOKENS = 77  # what CLIP reads
SIZES = 6  # numbers that tell the UNet of size and crop
VAE_FACTOR = 8

moments = kl_moments
pack_latents = identity_layout
pixels = decode_kl
call = pooled_call


def encode(pipeline: Any, texts: Sequence[str]) -> Text:
    device = pipeline.text_encoder.device
    embedding_BLD, _, pooled_BD, _ = pipeline.encode_prompt(
        list(texts), device=device, do_classifier_free_guidance=False
    )
    return {"embedding": embedding_BLD, "pooled": pooled_BD}


def reader(pipeline: Any) -> tuple[Any, int]:
    return pipeline.tokenizer, pipeline.tokenizer.model_max_length


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    pooled = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim
    return {"embedding": (TEXT_TOKENS, config.cross_attention_dim), "pooled": (pooled,)}


def latent_channels(config: Any) -> int:
    return int(config.in_channels)


def objective(scheduler: Any) -> Objective:
    return Denoising(scheduler)


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    """The piece that was cut out counts as the whole image: what is drawn later then looks whole, not cropped."""
    height, width = (side * VAE_FACTOR for side in noisy_BChw.shape[-2:])
    sizes_B6 = torch.tensor([[height, width, 0, 0, height, width]] * len(noisy_BChw), device=noisy_BChw.device)
    prediction: Tensor = model(
        noisy_BChw,
        timesteps_B,
        encoder_hidden_states=text["embedding"],
        added_cond_kwargs={"text_embeds": text["pooled"], "time_ids": sizes_B6.to(text["pooled"].dtype)},
        return_dict=False,
    )[0]
    return prediction
