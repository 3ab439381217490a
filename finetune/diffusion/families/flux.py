"""FLUX.1 (Black Forest Labs, 2024): a transformer over packed 2×2 patches of latents."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.diffusion.families.base import Text, kl_moments, kl_pixels
from finetune.diffusion.objectives import FLOW_STEPS, Flow, Objective

PIPELINE = "FluxPipeline"
BACKBONE, BACKBONE_CLASS, VAE_CLASS = "transformer", "FluxTransformer2DModel", "AutoencoderKL"
TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
UNUSED = {"feature_extractor": None, "image_encoder": None}
LARGE_TEXT = ("text_encoder_2",)
KOHYA = "lora_transformer_"  # OneTrainer's names, which ComfyUI reads too; diffusers only attention layers
FILE_TEXT = {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.t5xxl."}
T5_TOKENS = 512
# FLUX.1-dev was distilled to take the guidance as a number; at 1 it predicts what the data says, and nothing stronger.
TRAINING_GUIDANCE = 1.0

moments = kl_moments


def encode(pipeline: Any, texts: Sequence[str]) -> Text:
    embedding_BLD, pooled_BD, _ = pipeline.encode_prompt(
        list(texts), device=pipeline.text_encoder.device, max_sequence_length=T5_TOKENS
    )
    return {"embedding": embedding_BLD, "pooled": pooled_BD}


def reader(pipeline: Any) -> tuple[Any, int]:
    return pipeline.tokenizer_2, T5_TOKENS


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {"embedding": (T5_TOKENS, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}


def latent_channels(config: Any) -> int:
    return int(config.in_channels) // 4


def objective(scheduler: Any) -> Objective:
    return Flow(scheduler)


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    height, width = noisy_BChw.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places_N3 = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(noisy_BChw)
    guided = getattr(model, "module", model).config.guidance_embeds  # several processes wrap the model
    prediction_BND = model(
        hidden_states=pack(noisy_BChw),
        timestep=timesteps_B / FLOW_STEPS,
        guidance=torch.full_like(timesteps_B, TRAINING_GUIDANCE, dtype=torch.float32) if guided else None,
        encoder_hidden_states=text["embedding"],
        pooled_projections=text["pooled"],
        txt_ids=noisy_BChw.new_zeros(text["embedding"].shape[1], 3),
        img_ids=places_N3,
        return_dict=False,
    )[0]
    return unpack(prediction_BND, height, width)


def pack_latents(latents_BChw: Tensor) -> Tensor:
    return pack(latents_BChw)


def pixels(vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return kl_pixels(vae, unpack(latents, height // factor, width // factor))


def call(text: Text, negative: Text, guidance: float) -> Mapping[str, Any]:
    """Guidance is an input of the model; a negative prompt has no place."""
    return {"prompt_embeds": text["embedding"], "pooled_prompt_embeds": text["pooled"], "guidance_scale": guidance}


def pack(latents_BChw: Tensor) -> Tensor:
    """Patches of 2×2 latent pixels as tokens, (B, h/2 · w/2, 4C)."""
    return latents_BChw.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(tokens_BND: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, (B, C, h, w)."""
    batch, _, channels = tokens_BND.shape
    patches = tokens_BND.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)
