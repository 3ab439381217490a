"""A tiny random pipeline of each family of picture models, built in code and saved in the ordinary layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.config import Family, ModelConfig
from tests.tiny_models import save_diffusion, save_tokenizer

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
}


def save_family(folder: Path, kind: Family) -> ModelConfig:
    """A saved pipeline of some 100,000 parameters for pictures of about 64x64, and the configuration that names it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SAVERS[kind](folder)
    return ModelConfig(
        base=str(folder), family=kind, resolution=64, bucket_step=32, lora_targets={"attention": ATTENTION}
    )


def _sdxl(folder: Path) -> None:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer, clip, projected = _clip(folder)
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(latent_channels=4, scaling_factor=0.13025, **VAE),
        text_encoder=clip(16),
        text_encoder_2=projected(16),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            cross_attention_dim=32,
            norm_num_groups=8,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    ).save_pretrained(folder)


def _sd3(folder: Path) -> None:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    tokenizer, _, projected = _clip(folder)
    t5_tokenizer, t5 = _t5(32)
    StableDiffusion3Pipeline(
        vae=AutoencoderKL(
            latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
            use_post_quant_conv=False, **VAE,
        ),
        text_encoder=projected(8),
        text_encoder_2=projected(8),
        text_encoder_3=t5,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
        transformer=SD3Transformer2DModel(
            sample_size=16,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=24,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip


def _flux(folder: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, clip, _ = _clip(folder)
    t5_tokenizer, t5 = _t5(32)
    FluxPipeline(
        vae=AutoencoderKL(
            latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False, **VAE,
        ),
        text_encoder=clip(16),
        text_encoder_2=t5,
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ).save_pretrained(folder)  # fmt: skip


def _clip(folder: Path) -> tuple[Any, Callable[[int], Any], Callable[[int], Any]]:
    """A CLIP tokenizer, and makers of text encoders of a width, without and with a projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(save_tokenizer(folder / "tokenizer"))

    def config(width: int) -> Any:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    return (
        tokenizer,
        lambda width: CLIPTextModel(config(width)),
        lambda width: CLIPTextModelWithProjection(config(width)),
    )


def _t5(width: int) -> tuple[Any, Any]:
    """A T5 tokenizer of single letters, and an encoder of that width."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import Unigram
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    learner = Tokenizer(Unigram([(letter, -1.0) for letter in letters], unk_id=2))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.decoder = decoders.Metaspace()
    tokenizer = T5TokenizerFast(tokenizer_object=learner, extra_ids=0)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return tokenizer, T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))


SAVERS: dict[Family, Callable[[Path], Any]] = {
    Family.sd: save_diffusion,
    Family.sdxl: _sdxl,
    Family.sd3: _sd3,
    Family.flux: _flux,
}
