"""A tiny random pipeline of each family of image models, built in code and saved in the ordinary layout."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune.config.schema import ModelConfig
from tests.tiny_models import save_diffusion
from tests.tiny_tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MORE = {  # names that in some blocks are a layer, and in others a list of layers or an activation
    "flux2": ["to_qkv_mlp_proj", "to_out"],
    "z_image": ["adaLN_modulation.0"],
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
}
QWEN = {
    "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def save_family(folder: Path, kind: str) -> ModelConfig:
    """A saved pipeline of some 100,000 parameters for images of about 64x64, and the configuration that names it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SAVERS[kind](folder)
    targets = {"attention": [*ATTENTION, *MORE.get(kind, [])]}
    return ModelConfig(base=str(folder), family=kind, resolution=64, bucket_step=32, lora_targets=targets)


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
    t5_reader, t5 = _t5(folder / "tokenizer_3", 32)
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
        tokenizer_3=t5_reader,
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
    t5_reader, t5 = _t5(folder / "tokenizer_2", 32)
    FluxPipeline(
        vae=AutoencoderKL(
            latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False, **VAE,
        ),
        text_encoder=clip(16),
        text_encoder_2=t5,
        tokenizer=tokenizer,
        tokenizer_2=t5_reader,
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


def _flux2(folder: Path) -> None:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3ForCausalLM

    tokenizer, config = _qwen3(folder, hidden_size=16, num_hidden_layers=28)  # the pipeline reads layers 9, 18 and 27
    vae = AutoencoderKLFlux2(latent_channels=4, **VAE)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    Flux2KleinPipeline(
        vae=vae,
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)


def _z_image(folder: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    tokenizer, config = _qwen3(folder, hidden_size=32, num_hidden_layers=2)
    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    for padding in (transformer.x_pad_token, transformer.cap_pad_token):
        padding.data.normal_()
    ZImagePipeline(
        vae=AutoencoderKL(
            latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False, **VAE,
        ),
        text_encoder=Qwen3Model(config),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip


def _qwen_image(folder: Path) -> None:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer, config = _qwen3(folder, hidden_size=32, num_hidden_layers=2)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", *QWEN)}
    rotary = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    QwenImagePipeline(
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[-0.8, 0.1, 0.9, -0.2], latents_std=[2.8, 1.5, 2.3, 1.2],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=sizes | {"rope_parameters": rotary}, vision_config=vision)
        ),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
    ).save_pretrained(folder)  # fmt: skip


def _qwen3(folder: Path, **sizes: int) -> tuple[Any, Any]:
    """A Qwen tokenizer, and the configuration of a text model of those sizes."""
    from transformers import Qwen3Config

    tokenizer = qwen_tokenizer(folder / "tokenizer")
    return tokenizer, Qwen3Config(vocab_size=len(tokenizer), head_dim=8, **QWEN, **sizes)


def _clip(folder: Path) -> tuple[Any, Callable[[int], Any], Callable[[int], Any]]:
    """A CLIP tokenizer, and makers of text encoders of a width, without and with a projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer(folder / "tokenizer")

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


def _t5(folder: Path, width: int) -> tuple[Any, Any]:
    """A T5 tokenizer, and an encoder of that width."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer(folder)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return tokenizer, T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))


SAVERS: dict[str, Callable[[Path], Any]] = {
    "sd": partial(save_diffusion, whole=True),
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "flux2": _flux2,
    "z_image": _z_image,
    "qwen_image": _qwen_image,
}
