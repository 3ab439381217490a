"""Stable Diffusion 1 and 2 (arXiv 2112.10752), and the small model that comes with the package."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from finetune.diffusion.families.base import Text, decode_kl, identity_layout, kl_moments
from finetune.diffusion.objectives import Denoising, Objective

PIPELINE = "StableDiffusionPipeline"
BACKBONE, BACKBONE_CLASS, VAE_CLASS = "unet", "UNet2DConditionModel", "AutoencoderKL"
TEXT = ("text_encoder", "tokenizer")
UNUSED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}
LARGE_TEXT: tuple[str, ...] = ()
KOHYA = "lora_unet_"  # sd-scripts' names, which diffusers and ComfyUI read too
FILE_TEXT = {"text_encoder": "cond_stage_model."}
TEXT_TOKENS = 77  # what CLIP reads

moments = kl_moments
pack_latents = identity_layout
pixels = decode_kl


def encode(pipeline: Any, texts: Sequence[str]) -> Text:
    device = pipeline.text_encoder.device
    embedding_BLD, _ = pipeline.encode_prompt(list(texts), device, 1, do_classifier_free_guidance=False)
    return {"embedding": embedding_BLD}


def reader(pipeline: Any) -> tuple[Any, int]:
    return pipeline.tokenizer, pipeline.tokenizer.model_max_length


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {"embedding": (TEXT_TOKENS, config.cross_attention_dim)}


def latent_channels(config: Any) -> int:
    return int(config.in_channels)


def objective(scheduler: Any) -> Objective:
    return Denoising(scheduler)


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    prediction: Tensor = model(noisy_BChw, timesteps_B, encoder_hidden_states=text["embedding"], return_dict=False)[0]
    return prediction


def call(text: Text, negative: Text, guidance: float) -> Mapping[str, Any]:
    return {
        "prompt_embeds": text["embedding"],
        "negative_prompt_embeds": negative["embedding"],
        "guidance_scale": guidance,
    }
