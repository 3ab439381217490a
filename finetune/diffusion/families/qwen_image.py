"""Qwen-Image (arXiv 2508.02324): a transformer over packed 2×2 patches, with a video autoencoder of one frame."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.diffusion.families.flux import PATCH, latent_channels, pack, unpack
from finetune.diffusion.families.spec import MASK, BaseVersion, FamilySpec, Text, lengths, padded, stacked
from finetune.diffusion.objectives import FLOW_STEPS
from finetune.diffusion.tiling import set_slicing

TEXT_TOKENS = 512  # of up to 1024; as many as the pipeline takes unless told otherwise


def encode(pipeline: Any, texts: Sequence[str]) -> Text:
    """Each by itself: together they would be filled up to the longest, and round otherwise."""
    device = pipeline.text_encoder.device
    captions = [pipeline.encode_prompt(text, device=device, max_sequence_length=TEXT_TOKENS)[0][0] for text in texts]
    return stacked([padded(caption_LD, TEXT_TOKENS) for caption_LD in captions])


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {"embedding": (TEXT_TOKENS, config.joint_attention_dim), MASK: (TEXT_TOKENS,)}


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    height, width = noisy_BChw.shape[-2:]
    embedding_BLD, mask_BL = _trimmed(text)
    predicted_BND = model(
        hidden_states=pack(noisy_BChw),
        timestep=timesteps_B / FLOW_STEPS,
        encoder_hidden_states=embedding_BLD,
        encoder_hidden_states_mask=mask_BL,
        img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(noisy_BChw),
        return_dict=False,
    )[0]
    return unpack(predicted_BND, height, width)


def moments(vae: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    set_slicing(vae, len(pixels_B3HW), pixels_B3HW[0, 0].numel())
    posterior = vae.encode(pixels_B3HW.unsqueeze(2)).latent_dist  # one frame
    shift_C11, spread_C11 = _shift_and_spread(vae, posterior.mean)
    return (posterior.mean.squeeze(2) - shift_C11) / spread_C11, posterior.std.squeeze(2) / spread_C11


def decode(vae: Any, packed_BND: Tensor, height: int, width: int) -> Tensor:
    set_slicing(vae, len(packed_BND), height * width)
    factor = vae.spatial_compression_ratio
    latents_BChw = unpack(packed_BND, height // factor, width // factor)
    shift_C11, spread_C11 = _shift_and_spread(vae, packed_BND)
    pixels_B31HW: Tensor = vae.decode((latents_BChw * spread_C11 + shift_C11).unsqueeze(2)).sample
    return pixels_B31HW.squeeze(2)


def pipeline_arguments(text: Text, negative: Text, guidance: float) -> Mapping[str, Any]:
    embedding_BLD, mask_BL = _trimmed(text)
    wanted = {"prompt_embeds": embedding_BLD, "prompt_embeds_mask": mask_BL, "true_cfg_scale": guidance}
    if guidance <= 1:
        return wanted
    embedding_BLD, mask_BL = _trimmed(negative)
    return wanted | {"negative_prompt_embeds": embedding_BLD, "negative_prompt_embeds_mask": mask_BL}


def _trimmed(text: Text) -> tuple[Tensor, Tensor]:
    """Embeddings and mask of the captions, cut to the longest of them."""
    longest = max(lengths(text[MASK]))
    return text["embedding"][:, :longest], text[MASK][:, :longest] > 0


def _shift_and_spread(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over the autoencoder's training data, (C, 1, 1)."""
    shift, spread = (
        torch.tensor(values).view(-1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return shift.to(like), spread.to(like)


SPEC = FamilySpec(
    pipeline="QwenImagePipeline",
    backbone="transformer",
    backbone_class="QwenImageTransformer2DModel",
    vae_class="AutoencoderKLQwenImage",
    text_tokens={"text_encoder": TEXT_TOKENS},  # what stands before the caption is taken off before it is cut
    captions_per_pass=1,
    large_text=("text_encoder",),
    kohya_prefix="lora_unet_",  # musubi-tuner's names, which diffusers and ComfyUI read too
    diffusers_reads_kohya=True,
    base_version=lambda *_: BaseVersion("qwen_image", "Qwen-Image"),
    file_vae=False,
    decode_workspace_measured=False,
    encode=encode,
    text_shapes=text_shapes,
    latent_channels=latent_channels,
    predict=predict,
    moments=moments,
    pack_latents=pack,
    decode=decode,
    pipeline_arguments=pipeline_arguments,
)
