"""FLUX.2 klein (Black Forest Labs, 2026): FLUX.1's transformer with one language model as its only text encoder.

The autoencoder's latents are packed in 2×2 patches and normalised channel by channel before anything else sees them, so
here C counts patched channels and h×w patches: a 32-channel latent at 1/8 of the size is one of 128 at 1/16.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.diffusion.families.base import Text, room_in_chat, set_slicing
from finetune.diffusion.objectives import FLOW_STEPS, Flow, Objective

PIPELINE = "Flux2KleinPipeline"
BACKBONE, BACKBONE_CLASS, VAE_CLASS = "transformer", "Flux2Transformer2DModel", "AutoencoderKLFlux2"
TEXT = ("text_encoder", "tokenizer")
UNUSED: Mapping[str, Any] = {}
LARGE_TEXT = ("text_encoder",)
KOHYA = "lora_transformer_"  # OneTrainer's names, which ComfyUI reads too; diffusers reads none of them
FILE_TEXT: Mapping[str, str] = {}
TEXT_TOKENS = 512  # the model was trained on captions filled up to these, and attends to all of them
PATCH = 2


def encode(pipeline: Any, texts: Sequence[str]) -> Text:
    """One caption at a time: the hidden states and logits of many would fill a GPU."""
    device = pipeline.text_encoder.device
    embeddings = [pipeline.encode_prompt(text, device=device, max_sequence_length=TEXT_TOKENS)[0] for text in texts]
    return {"embedding": torch.cat(embeddings)}


def reader(pipeline: Any) -> tuple[Any, int]:
    return pipeline.tokenizer, room_in_chat(pipeline.tokenizer, TEXT_TOKENS, enable_thinking=False)


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {"embedding": (TEXT_TOKENS, config.joint_attention_dim)}


def latent_channels(config: Any) -> int:
    return int(config.in_channels)


def objective(scheduler: Any) -> Objective:
    """Shifted by size as the pipeline does for 200 steps; for fewer it shifts further, to spend them on composition."""
    return Flow(scheduler, patch=1)


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    height, width = noisy_BChw.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    zeros_N = torch.zeros(height * width)
    places_N4 = torch.stack([zeros_N, rows.flatten(), columns.flatten(), zeros_N], dim=-1)  # frame, row, column, token
    tokens = text["embedding"].shape[1]
    places_L4 = torch.zeros(tokens, 4)
    places_L4[:, 3] = torch.arange(tokens)
    prediction_BNC = model(
        hidden_states=noisy_BChw.flatten(2).transpose(1, 2),
        timestep=timesteps_B / FLOW_STEPS,
        guidance=None,  # klein models take none
        encoder_hidden_states=text["embedding"],
        txt_ids=places_L4.to(noisy_BChw.device),
        img_ids=places_N4.to(noisy_BChw.device),
        return_dict=False,
    )[0]
    prediction_BChw: Tensor = prediction_BNC.transpose(1, 2).unflatten(2, (height, width))
    return prediction_BChw


def moments(vae: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Patched as the pipeline does and normalised with the running statistics of the autoencoder's batch norm."""
    set_slicing(vae, len(pixels_B3HW), pixels_B3HW[0, 0].numel())
    posterior = vae.encode(pixels_B3HW).latent_dist
    mean_C11, variance_C11 = (values.view(-1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var))
    spread_C11 = (variance_C11 + vae.config.batch_norm_eps).sqrt()
    patched = functional.pixel_unshuffle(posterior.mean, PATCH), functional.pixel_unshuffle(posterior.std, PATCH)
    return (patched[0] - mean_C11) / spread_C11, patched[1] / spread_C11


def pack_latents(latents_BChw: Tensor) -> Tensor:
    return functional.pixel_shuffle(latents_BChw, PATCH)


def pixels(vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """The pipeline has undone patches and normalisation."""
    set_slicing(vae, len(latents), height * width)
    decoded: Tensor = vae.decode(latents).sample
    return decoded


def call(text: Text, negative: Text, guidance: float) -> Mapping[str, Any]:
    """Distilled bases ignore the guidance, and say so."""
    return {
        "prompt_embeds": text["embedding"],
        "negative_prompt_embeds": negative["embedding"],
        "guidance_scale": guidance,
    }
