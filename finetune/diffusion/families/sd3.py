"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from finetune.diffusion.families.spec import CLIP_TOKENS, BaseVersion, FamilySpec, Text

T5_TOKENS = 256


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


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """CLIP's tokens, which both of its encoders share, and T5's behind them."""
    return {
        "embedding": (CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim),
        "pooled": (config.pooled_projection_dim,),
    }


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    predicted_BChw: Tensor = model(
        hidden_states=noisy_BChw,
        timestep=timesteps_B,
        encoder_hidden_states=text["embedding"],
        pooled_projections=text["pooled"],
        return_dict=False,
    )[0]
    return predicted_BChw


SPEC = FamilySpec(
    pipeline="StableDiffusion3Pipeline",
    unused={"feature_extractor": None, "image_encoder": None},
    backbone="transformer",
    backbone_class="SD3Transformer2DModel",
    text_tokens={"text_encoder": CLIP_TOKENS, "text_encoder_2": CLIP_TOKENS, "text_encoder_3": T5_TOKENS},
    large_text=("text_encoder_3",),
    kohya_prefix="lora_transformer_",  # OneTrainer's names, which ComfyUI reads too; diffusers reads none of them
    base_version=lambda *_: BaseVersion("sd3", "stable-diffusion-3"),
    file_text_prefixes={
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    },
    decode_workspace_measured=True,
    encode=encode,
    text_shapes=text_shapes,
    predict=predict,
)
