"""What a family of image models is: the facts and functions in which one architecture differs from another.

What a `FamilySpec` leaves out is as in most latent diffusion models; what all share is `finetune.diffusion.pipeline`.

B images, C latent channels, h×w latent pixels, H×W pixels, L text tokens, D text width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from finetune.diffusion.objectives import Objective, of_scheduler
from finetune.diffusion.tiling import set_slicing

Text = dict[str, Tensor]
"""What the text encoders make of one caption, or stacked of many; the same shapes for every one."""
MASK = "mask"  # in a `Text` whose captions differ in length: 1 for a caption's own tokens, 0 for padding
CLIP_TOKENS = 77  # what every CLIP text encoder reads
TEXT_BATCH = 32  # captions in one pass; more would only take memory
PLACEHOLDER = "\N{DOTTED CIRCLE}"  # any text that no chat template holds


def kl_moments(vae: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """`moments` of an AutoencoderKL: shifted and scaled as its configuration says."""
    set_slicing(vae, len(pixels_B3HW), pixels_B3HW[0, 0].numel())
    posterior = vae.encode(pixels_B3HW).latent_dist
    shift, scale = _shift_and_scale(vae)
    return (posterior.mean - shift) * scale, posterior.std * scale


def decode_kl(vae: Any, latents_BChw: Tensor, height: int, width: int) -> Tensor:
    """`decode` of an AutoencoderKL."""
    set_slicing(vae, len(latents_BChw), height * width)
    shift, scale = _shift_and_scale(vae)
    pixels_B3HW: Tensor = vae.decode(latents_BChw / scale + shift).sample
    return pixels_B3HW


def _shift_and_scale(vae: Any) -> tuple[float, float]:
    return float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)


def guided_arguments(text: Text, negative: Text, guidance: float) -> Mapping[str, Any]:
    """`pipeline_arguments` of a pipeline with classifier-free guidance, with pooled embeddings if there are any."""
    arguments: dict[str, Any] = {
        "prompt_embeds": text["embedding"],
        "negative_prompt_embeds": negative["embedding"],
        "guidance_scale": guidance,
    }
    if "pooled" in text:
        arguments |= {"pooled_prompt_embeds": text["pooled"], "negative_pooled_prompt_embeds": negative["pooled"]}
    return arguments


@dataclass(frozen=True)
class BaseVersion:
    """How other programs name a base in an adapter's metadata, and filter by it.

    name: `ss_base_model_version` of sd-scripts. architecture: of Stability AI's ModelSpec, without `/lora`. v2: Stable
    Diffusion 2.
    """

    name: str
    architecture: str
    v2: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class FamilySpec:
    """One architecture of image models; the `SPEC` of its module."""

    pipeline: str
    """The class of diffusers whose folders, text encoding, sampling and LoRA files these models have."""
    unused: Mapping[str, Any] = field(default_factory=dict)
    """The pipeline's arguments that leave out what neither training nor sampling needs."""
    backbone: str
    """The part that is trained: unet or transformer."""
    backbone_class: str
    vae_class: str = "AutoencoderKL"
    text_tokens: Mapping[str, int]
    """By text encoder how many tokens of a caption it reads, the one that reads most last. Each has a tokenizer."""
    captions_per_pass: int = TEXT_BATCH
    """Most captions that the text encoders read at once."""
    large_text: tuple[str, ...] = ()
    """Text encoders of billions of parameters: loaded in bf16, as they are released; others in fp32."""
    kohya_prefix: str
    """What begins the names of layers in kohya-style files, so that other programs know them; see `save_kohya`."""
    diffusers_reads_kohya: bool = False
    """Whether the pipeline's `load_lora_weights` reads every layer of such a file."""
    base_version: Callable[[Any, Any], BaseVersion]
    """(backbone's configuration, scheduler's configuration): what kohya-style files say of their base."""
    file_text_prefixes: Mapping[str, str] = field(default_factory=dict)
    """How names of each text encoder begin in a single file of the original layout; others are never in one."""
    file_vae: bool = True
    """Whether diffusers reads the autoencoder of such a file."""
    decode_workspace_measured: bool
    """Whether the memory plan's figure for decoding was measured with this autoencoder too: see `memory_model`."""

    encode: Callable[[Any, Sequence[str]], Text]
    """(pipeline, captions): the captions as the backbone reads them; the pipeline has no weights but text encoders."""
    chat_template: Mapping[str, Any] | None = None
    """Arguments of the chat template that the text encoder reads a caption in; None if it reads the caption alone."""
    text_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    """(backbone's configuration): shapes of one caption's `Text`."""
    latent_channels: Callable[[Any], int] = field(default=lambda config: int(config.in_channels))
    """(backbone's configuration): C."""
    objective: Callable[[Any], Objective] = of_scheduler
    """(scheduler): what the backbone learns to predict."""
    predict: Callable[[Any, Tensor, Tensor, Text], Tensor]
    """(backbone, noisy latents (B, C, h, w), timesteps (B,), captions): its prediction, (B, C, h, w)."""
    capturable: bool = False
    """Whether a step may be a CUDA graph: nothing in `predict` comes from the host. Pays for a UNet's many kernels."""
    moments: Callable[[Any, Tensor], tuple[Tensor, Tensor]] = kl_moments
    """(autoencoder, pixels (B, 3, H, W)): mean and standard deviation of the backbone's latents, (B, C, h, w) each."""
    pack_latents: Callable[[Tensor], Tensor] = field(default=lambda latents_BChw: latents_BChw)
    """Latents (B, C, h, w) in the shape in which the pipeline leaves them for `decode`; the values stay as they are."""
    decode: Callable[[Any, Tensor, int, int], Tensor] = decode_kl
    """(autoencoder, latents as the pipeline leaves them, H, W): pixels (B, 3, H, W) in -1 … 1."""
    pipeline_arguments: Callable[[Text, Text, float], Mapping[str, Any]] = guided_arguments
    """(captions, negative captions, guidance): the pipeline's arguments for stacked captions."""
    takes_negative: bool = True
    """Whether guidance above 1 draws each image away from a negative prompt too, in a forward pass of its own."""

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The pipeline's parts that read captions."""
        return (*self.text_tokens, *map(tokenizer_of, self.text_tokens))

    @property
    def parts(self) -> tuple[str, ...]:
        """The pipeline's parts that are loaded from a base."""
        return (self.backbone, "vae", *self.text_parts)

    def tokenizer_and_limit(self, pipeline: Any) -> tuple[Any, int]:
        """The tokenizer that reads most of a caption, and how many of its tokens."""
        encoder, tokens = list(self.text_tokens.items())[-1]
        tokenizer = getattr(pipeline, tokenizer_of(encoder))
        if self.chat_template is None:
            return tokenizer, tokens
        turns = [{"role": "user", "content": PLACEHOLDER}]
        written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **self.chat_template)
        before = tokenizer(written.partition(PLACEHOLDER)[0]).input_ids
        return tokenizer, tokens - len(before)  # where it is too long, the end of the whole is cut


def tokenizer_of(text_encoder: str) -> str:
    """The pipeline's part that makes the tokens of a text encoder."""
    return text_encoder.replace("text_encoder", "tokenizer")


def padded(embedding_LD: Tensor, tokens: int) -> Text:
    """One caption's embedding filled up with zeros to so many tokens, and its mask."""
    missing = tokens - len(embedding_LD)
    mask_L = functional.pad(torch.ones(len(embedding_LD)), (0, missing))
    return {"embedding": functional.pad(embedding_LD, (0, 0, 0, missing)), MASK: mask_L}


def stacked(captions: Sequence[Text]) -> Text:
    """Captions as one `Text` with a first dimension B."""
    return {name: torch.stack([caption[name] for caption in captions]) for name in captions[0]}


def lengths(mask_BL: Tensor) -> list[int]:
    """Tokens of each caption; all of them where a memory plan computes with shapes and knows no values."""
    if isinstance(mask_BL, FakeTensor):
        return [mask_BL.shape[1]] * len(mask_BL)
    return (mask_BL > 0).sum(dim=1).tolist()
