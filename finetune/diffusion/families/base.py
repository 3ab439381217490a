"""What sets one family of image models apart from another; all else is `finetune.diffusion.pipeline`.

B images, C latent channels, h×w latent pixels, H×W pixels, L text tokens, D text width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from finetune.diffusion.objectives import Objective

# Most pixels that an autoencoder takes at once: of several images, which then come one by one; of one image, which
# then comes in overlapping tiles. Tiles are normalised each by itself and blended, so smaller images are left whole.
MAX_BATCH_PIXELS, UNTILED = 1024**2, 2 * 1024**2
TILE = 512  # pixels a side, of the tiles of an autoencoder that has to be thrifty
TILED = "takes_tiles"  # an attribute of an autoencoder, see `enable_tiling`
Text = dict[
    str, Tensor
]  # what the text encoders make of one caption, or stacked of many; the same shapes for every one
MASK = "mask"  # in a `Text` whose captions differ in length: 1 for a caption's own tokens, 0 for what fills it up
PLACEHOLDER = "\N{DOTTED CIRCLE}"  # any text that no chat template holds


class Family(Protocol):
    """A module of `finetune.diffusion.families`: one architecture of image models."""

    PIPELINE: str
    """The class of diffusers whose folders, text encoding, sampling and LoRA files these models have."""
    BACKBONE: str
    """The part that is trained: unet or transformer."""
    BACKBONE_CLASS: str
    VAE_CLASS: str
    TEXT: tuple[str, ...]
    """The pipeline's parts that read captions."""
    UNUSED: Mapping[str, Any]
    """The pipeline's arguments that leave out what neither training nor sampling needs."""
    LARGE_TEXT: tuple[str, ...]
    """Text encoders of billions of parameters: loaded in bf16, as they are released; others in fp32."""
    KOHYA: str
    """What begins the names of layers in kohya-style files, so that other programs know them; see `save_kohya`."""
    FILE_TEXT: Mapping[str, str]
    """How names of each text encoder begin in a single file of the original layout; others are never in one."""

    def encode(self, pipeline: Any, texts: Sequence[str]) -> Text:
        """The captions as the backbone reads them, stacked; `pipeline` has the text encoders and no other weights."""
        ...

    def reader(self, pipeline: Any) -> tuple[Any, int]:
        """The tokenizer that reads most of a caption, and how many of its tokens."""
        ...

    def text_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of one caption's `Text`, from the backbone's configuration."""
        ...

    def latent_channels(self, config: Any) -> int:
        """C, from the backbone's configuration."""
        ...

    def objective(self, scheduler: Any) -> Objective:
        """What the backbone learns to predict."""
        ...

    def predict(self, model: Any, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
        """The backbone's prediction, (B, C, h, w)."""
        ...

    def moments(self, vae: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents as the backbone sees them, each (B, C, h, w)."""
        ...

    def pack_latents(self, latents_BChw: Tensor) -> Tensor:
        """Latents in the shape in which the pipeline leaves them, for `pixels`; of their values nothing is undone."""
        ...

    def pixels(self, vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """What the pipeline left as latents, as pixels (B, 3, H, W) in -1 … 1. height, width: of the image."""
        ...

    def call(self, text: Text, negative: Text, guidance: float) -> Mapping[str, Any]:
        """The pipeline's arguments for stacked captions."""
        ...


def kl_moments(vae: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """`moments` of an AutoencoderKL: shifted and scaled as its configuration says."""
    set_slicing(vae, len(pixels_B3HW), pixels_B3HW[0, 0].numel())
    posterior = vae.encode(pixels_B3HW).latent_dist
    shift, scale = float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)
    return (posterior.mean - shift) * scale, posterior.std * scale


def kl_pixels(vae: Any, latents_BChw: Tensor) -> Tensor:
    """`pixels` of an AutoencoderKL."""
    shift, scale = float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)  # of the sides
    set_slicing(vae, len(latents_BChw), latents_BChw[0, 0].numel() * factor**2)
    pixels: Tensor = vae.decode(latents_BChw / scale + shift).sample
    return pixels


def identity_layout(latents_BChw: Tensor) -> Tensor:
    """`pack_latents` of a family whose pipeline leaves latents as they are."""
    return latents_BChw


def decode_kl(vae: Any, latents_BChw: Tensor, height: int, width: int) -> Tensor:
    """`pixels` of a family whose pipeline leaves an AutoencoderKL's latents as they are."""
    return kl_pixels(vae, latents_BChw)


def pooled_call(text: Text, negative: Text, guidance: float) -> Mapping[str, Any]:
    """`call` of a pipeline with classifier-free guidance and pooled embeddings."""
    return {
        "prompt_embeds": text["embedding"],
        "pooled_prompt_embeds": text["pooled"],
        "negative_prompt_embeds": negative["embedding"],
        "negative_pooled_prompt_embeds": negative["pooled"],
        "guidance_scale": guidance,
    }


def set_slicing(vae: Any, images: int, pixels: int) -> None:
    """Set how the autoencoder goes about so many images of so many pixels each."""
    vae.use_slicing = is_tiled(vae) or images * pixels > MAX_BATCH_PIXELS
    vae.use_tiling = is_tiled(vae) or pixels > UNTILED


def is_tiled(vae: Any) -> bool:
    """Whether `enable_tiling` was called."""
    return bool(getattr(vae, TILED, False))


def enable_tiling(vae: Any) -> None:
    """Have an autoencoder take whatever is larger than a tile in tiles, for the sake of memory."""
    setattr(vae, TILED, True)
    if hasattr(vae, "tile_latent_min_size"):  # else it has small tiles by itself; these are as large as its images
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 2 ** (len(vae.config.block_out_channels) - 1)


def padded(embedding_LD: Tensor, tokens: int) -> Text:
    """One caption's embedding filled up with zeros to so many tokens, and its mask."""
    missing = tokens - len(embedding_LD)
    mask_L = functional.pad(torch.ones(len(embedding_LD)), (0, missing))
    return {"embedding": functional.pad(embedding_LD, (0, 0, 0, missing)), MASK: mask_L}


def stacked(captions: Sequence[Text]) -> Text:
    return {name: torch.stack([caption[name] for caption in captions]) for name in captions[0]}


def lengths(mask_BL: Tensor) -> list[int]:
    """Tokens of each caption; all of them where a memory plan computes with shapes and knows no values."""
    if isinstance(mask_BL, FakeTensor):
        return [mask_BL.shape[1]] * len(mask_BL)
    return (mask_BL > 0).sum(dim=1).tolist()


def room_in_chat(tokenizer: Any, tokens: int, **template: Any) -> int:
    """Tokens of a caption that are read of `tokens`: a chat template stands before it, and the end is cut first."""
    turns = [{"role": "user", "content": PLACEHOLDER}]
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **template)
    return tokens - len(tokenizer(written.partition(PLACEHOLDER)[0]).input_ids)
