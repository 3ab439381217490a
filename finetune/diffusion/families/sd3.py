"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from finetune.diffusion.families.base import Text, decode_kl, identity_layout, kl_moments, pooled_call
from finetune.diffusion.objectives import Flow, Objective

PIPELINE = "StableDiffusion3Pipeline"
BACKBONE, BACKBONE_CLASS, VAE_CLASS = "transformer", "SD3Transformer2DModel", "AutoencoderKL"
TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
UNUSED = {"feature_extractor": None, "image_encoder": None}
LARGE_TEXT = ("text_encoder_3",)
KOHYA = "lora_transformer_"  # OneTrainer's names, which ComfyUI reads too; diffusers reads none of them
FILE_TEXT = {
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.clip_g.",
    "text_encoder_3": "text_encoders.t5xxl.",
}
CLIP_TOKENS, T5_TOKENS = 77, 256

moments = kl_moments
pack_latents = identity_layout
pixels = decode_kl
call = pooled_call


def encode(pipeline: Any, texts: Sequence[str]) -> Text:
    prompts = list(texts)
    embedding_BLD, _, pooled_BD, _ = pipeline.encode_prompt(
        prompts,
        prompts,
        prompts,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=T5_TOKENS,
    )
    return {"embedding": embedding_BLD, "pooled": pooled_BD}


def reader(pipeline: Any) -> tuple[Any, int]:
    return pipeline.tokenizer_3, T5_TOKENS


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {
        "embedding": (CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim),
        "pooled": (config.pooled_projection_dim,),
    }


def latent_channels(config: Any) -> int:
    return int(config.in_channels)


def objective(scheduler: Any) -> Objective:
    return Flow(scheduler)


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    prediction: Tensor = model(
        hidden_states=noisy_BChw,
        timestep=timesteps_B,
        encoder_hidden_states=text["embedding"],
        pooled_projections=text["pooled"],
        return_dict=False,
    )[0]
    return prediction
