"""Stable Diffusion 1 and 2 (arXiv 2112.10752), and the small model that comes with the package."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from finetune.diffusion.families.spec import CLIP_TOKENS, BaseVersion, FamilySpec, Text

OPEN_CLIP_WIDTH = 1024  # of Stable Diffusion 2's unet/config.json; 768 in version 1


def encode(pipeline: Any, texts: Sequence[str]) -> Text:
    device = pipeline.text_encoder.device
    embedding_BLD, _ = pipeline.encode_prompt(list(texts), device, 1, do_classifier_free_guidance=False)
    return {"embedding": embedding_BLD}


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {"embedding": (CLIP_TOKENS, config.cross_attention_dim)}


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    predicted: Tensor = model(noisy_BChw, timesteps_B, encoder_hidden_states=text["embedding"], return_dict=False)[0]
    return predicted


def base_version(config: Any, scheduler: Any) -> BaseVersion:
    """Version 2 reads OpenCLIP's text encoder, of twice the width; both learn to predict noise or velocity."""
    velocity = scheduler.prediction_type == "v_prediction"
    suffix = "_v" if velocity else ""
    if config.cross_attention_dim != OPEN_CLIP_WIDTH:
        return BaseVersion(f"sd_v1{suffix}", "stable-diffusion-v1")
    return BaseVersion(f"sd_v2{suffix}", f"stable-diffusion-v2-{'768-v' if velocity else '512'}", v2=True)


SPEC = FamilySpec(
    pipeline="StableDiffusionPipeline",
    unused={"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False},
    backbone="unet",
    backbone_class="UNet2DConditionModel",
    text_tokens={"text_encoder": CLIP_TOKENS},
    kohya_prefix="lora_unet_",  # sd-scripts' names, which diffusers and ComfyUI read too
    diffusers_reads_kohya=True,
    base_version=base_version,
    file_text_prefixes={"text_encoder": "cond_stage_model."},
    decode_workspace_measured=True,
    encode=encode,
    text_shapes=text_shapes,
    predict=predict,
    capturable=True,
)
