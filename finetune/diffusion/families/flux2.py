"""FLUX.2 klein (Black Forest Labs, 2026): FLUX.1's transformer with one language model as its only text encoder.

The autoencoder's latents are packed in 2×2 patches and normalised channel by channel before anything else sees them, so
here C counts patched channels and h×w patches: a 32-channel latent at 1/8 of the size is one of 128 at 1/16.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.diffusion.families.spec import BaseVersion, FamilySpec, Text
from finetune.diffusion.objectives import FLOW_STEPS, Flow
from finetune.diffusion.tiling import set_slicing

TEXT_TOKENS = 512  # the model was trained on captions filled up to these, and attends to all of them
PATCH = 2  # latent pixels on a side


def encode(pipeline: Any, texts: Sequence[str]) -> Text:
    device = pipeline.text_encoder.device
    embedding_BLD, _ = pipeline.encode_prompt(list(texts), device=device, max_sequence_length=TEXT_TOKENS)
    return {"embedding": embedding_BLD}


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {"embedding": (TEXT_TOKENS, config.joint_attention_dim)}


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    height, width = noisy_BChw.shape[-2:]
    zero, tokens = torch.arange(1), torch.arange(text["embedding"].shape[1])
    # Frame, row, column and token of each: patches have the first three, captions' tokens the last.
    img_ids_N4 = torch.cartesian_prod(zero, torch.arange(height), torch.arange(width), zero)
    txt_ids_L4 = torch.cartesian_prod(zero, zero, zero, tokens)
    predicted_BNC = model(
        hidden_states=noisy_BChw.flatten(2).transpose(1, 2),
        timestep=timesteps_B / FLOW_STEPS,
        guidance=None,  # klein models take none
        encoder_hidden_states=text["embedding"],
        txt_ids=txt_ids_L4.float().to(noisy_BChw.device),
        img_ids=img_ids_N4.float().to(noisy_BChw.device),
        return_dict=False,
    )[0]
    predicted_BChw: Tensor = predicted_BNC.transpose(1, 2).unflatten(2, (height, width))
    return predicted_BChw


def moments(vae: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Patched as the pipeline does and normalised with the running statistics of the autoencoder's batch norm."""
    set_slicing(vae, len(pixels_B3HW), pixels_B3HW[0, 0].numel())
    posterior = vae.encode(pixels_B3HW).latent_dist
    mean_C11, variance_C11 = (values.view(-1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var))
    spread_C11 = (variance_C11 + vae.config.batch_norm_eps).sqrt()
    patched = functional.pixel_unshuffle(posterior.mean, PATCH), functional.pixel_unshuffle(posterior.std, PATCH)
    return (patched[0] - mean_C11) / spread_C11, patched[1] / spread_C11


def decode(vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """The pipeline has undone patches and normalisation."""
    set_slicing(vae, len(latents), height * width)
    pixels_B3HW: Tensor = vae.decode(latents).sample
    return pixels_B3HW


SPEC = FamilySpec(
    pipeline="Flux2KleinPipeline",
    backbone="transformer",
    backbone_class="Flux2Transformer2DModel",
    vae_class="AutoencoderKLFlux2",
    text_tokens={"text_encoder": TEXT_TOKENS},
    captions_per_pass=1,  # the hidden states and logits of many would fill a GPU
    large_text=("text_encoder",),
    kohya_prefix="lora_transformer_",  # OneTrainer's names, which ComfyUI reads too; diffusers reads none of them
    base_version=lambda *_: BaseVersion("flux2", "flux-2-klein"),
    file_vae=False,
    decode_workspace_measured=True,
    encode=encode,
    chat_template={"enable_thinking": False},
    text_shapes=text_shapes,
    # Shifted by size as the pipeline does for 200 steps; for fewer it shifts further, to spend them on composition.
    objective=partial(Flow, patch=1),
    predict=predict,
    moments=moments,
    pack_latents=partial(functional.pixel_shuffle, upscale_factor=PATCH),
    decode=decode,  # distilled bases ignore the guidance, and say so
)
