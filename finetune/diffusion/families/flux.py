"""FLUX.1 (Black Forest Labs, 2024): a transformer over packed 2×2 patches of latents.

N patches of an image, as tokens of width 4C. How far the timesteps are shifted towards noise for larger images is in
the scheduler's configuration; `finetune.diffusion.objectives.Flow` applies it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.diffusion.families.spec import CLIP_TOKENS, BaseVersion, FamilySpec, Text, decode_kl
from finetune.diffusion.objectives import FLOW_STEPS
from finetune.diffusion.tiling import scale_factor

T5_TOKENS = 512
PATCH = 2  # latent pixels on a side
# FLUX.1-dev was distilled to take the guidance as a number; at 1 it predicts what the data says, and nothing stronger.
TRAINING_GUIDANCE = 1.0


def encode(pipeline: Any, texts: Sequence[str]) -> Text:
    embedding_BLD, pooled_BD, _ = pipeline.encode_prompt(
        list(texts), device=pipeline.text_encoder.device, max_sequence_length=T5_TOKENS
    )
    return {"embedding": embedding_BLD, "pooled": pooled_BD}


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {"embedding": (T5_TOKENS, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}


def latent_channels(config: Any) -> int:
    return int(config.in_channels) // PATCH**2


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    height, width = noisy_BChw.shape[-2:]
    img_ids_N3 = torch.cartesian_prod(  # 0, row, column of each patch
        torch.arange(1), torch.arange(height // PATCH), torch.arange(width // PATCH)
    )
    takes_guidance = getattr(model, "module", model).config.guidance_embeds  # several processes wrap the model
    predicted_BND = model(
        hidden_states=pack(noisy_BChw),
        timestep=timesteps_B / FLOW_STEPS,
        guidance=torch.full_like(timesteps_B, TRAINING_GUIDANCE, dtype=torch.float32) if takes_guidance else None,
        encoder_hidden_states=text["embedding"],
        pooled_projections=text["pooled"],
        txt_ids=noisy_BChw.new_zeros(text["embedding"].shape[1], 3),
        img_ids=img_ids_N3.to(noisy_BChw),
        return_dict=False,
    )[0]
    return unpack(predicted_BND, height, width)


def pack(latents_BChw: Tensor) -> Tensor:
    """Patches as tokens: b c (h ph) (w pw) -> b (h w) (c ph pw)."""
    batch, channels, height, width = latents_BChw.shape
    patches = latents_BChw.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)  # b c h ph w pw
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens_BND: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: b (h w) (c ph pw) -> b c (h ph) (w pw). height, width: of the latents."""
    batch = len(tokens_BND)
    patches = tokens_BND.reshape(batch, height // PATCH, width // PATCH, -1, PATCH, PATCH)  # b h w c ph pw
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def decode(vae: Any, packed_BND: Tensor, height: int, width: int) -> Tensor:
    factor = scale_factor(vae)
    return decode_kl(vae, unpack(packed_BND, height // factor, width // factor), height, width)


def pipeline_arguments(text: Text, negative: Text, guidance: float) -> Mapping[str, Any]:
    """Guidance is an input of the model; a negative prompt has no place."""
    return {"prompt_embeds": text["embedding"], "pooled_prompt_embeds": text["pooled"], "guidance_scale": guidance}


def base_version(config: Any, _: Any) -> BaseVersion:
    return BaseVersion("flux1", "flux-1-dev" if config.guidance_embeds else "flux-1-schnell")


SPEC = FamilySpec(
    pipeline="FluxPipeline",
    unused={"feature_extractor": None, "image_encoder": None},
    backbone="transformer",
    backbone_class="FluxTransformer2DModel",
    text_tokens={"text_encoder": CLIP_TOKENS, "text_encoder_2": T5_TOKENS},
    large_text=("text_encoder_2",),
    kohya_prefix="lora_transformer_",  # OneTrainer's names, which ComfyUI reads too; diffusers only attention layers
    base_version=base_version,
    file_text_prefixes={"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.t5xxl."},
    decode_workspace_measured=True,
    encode=encode,
    text_shapes=text_shapes,
    latent_channels=latent_channels,
    predict=predict,
    pack_latents=pack,
    decode=decode,
    pipeline_arguments=pipeline_arguments,
    takes_negative=False,
)
