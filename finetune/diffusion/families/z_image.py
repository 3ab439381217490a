"""Z-Image (Tongyi-MAI, arXiv 2511.22699): one stream of caption and image tokens.

The model counts time from noise (0) to clean (1) and predicts the velocity that way; both are turned round here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.diffusion.families.spec import MASK, BaseVersion, FamilySpec, Text, lengths, padded, stacked
from finetune.diffusion.objectives import FLOW_STEPS

TEXT_TOKENS = 512


def encode(pipeline: Any, texts: Sequence[str]) -> Text:
    device = pipeline.text_encoder.device
    embeddings, _ = pipeline.encode_prompt(
        list(texts), device=device, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
    )
    return stacked([padded(embedding_LD, TEXT_TOKENS) for embedding_LD in embeddings])


def text_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {"embedding": (TEXT_TOKENS, config.cap_feat_dim), MASK: (TEXT_TOKENS,)}


def predict(model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
    velocities_C1hw = model(
        list(noisy_BChw.unsqueeze(2)),  # one frame
        1 - timesteps_B / FLOW_STEPS,
        _captions(text),
        return_dict=False,
    )[0]
    return -torch.stack(velocities_C1hw).squeeze(2)


def pipeline_arguments(text: Text, negative: Text, guidance: float) -> Mapping[str, Any]:
    """The pipeline counts the guidance from 0, as arXiv 2207.12598 does; everywhere else here 1 is none."""
    return {
        "prompt_embeds": _captions(text),
        "negative_prompt_embeds": _captions(negative),
        "guidance_scale": max(0.0, guidance - 1),
    }


def _captions(text: Text) -> list[Tensor]:
    """Each caption's embedding at its own length, (L, D)."""
    return [values_LD[:own] for values_LD, own in zip(text["embedding"], lengths(text[MASK]), strict=True)]


SPEC = FamilySpec(
    pipeline="ZImagePipeline",
    backbone="transformer",
    backbone_class="ZImageTransformer2DModel",
    text_tokens={"text_encoder": TEXT_TOKENS},
    captions_per_pass=1,  # the hidden states of many would fill a GPU
    large_text=("text_encoder",),
    kohya_prefix="diffusion_model.",  # the one form that both diffusers and ComfyUI read together with alpha
    diffusers_reads_kohya=True,
    base_version=lambda *_: BaseVersion("z_image", "Z-Image"),
    decode_workspace_measured=True,
    encode=encode,
    chat_template={"enable_thinking": True},
    text_shapes=text_shapes,
    predict=predict,
    pipeline_arguments=pipeline_arguments,
)
