"""The parts of a latent diffusion model, each loaded when its phase needs it and dropped after.

B images, 3 colours, C latent channels, H×W pixels, h×w latent pixels, L text tokens, D text width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.models import hub


class TextEncoder:
    """A frozen CLIP text encoder with its tokenizer."""

    def __init__(self, base: str, device: torch.device) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        self.identity = text_identity(base)
        self.device = device
        self.tokenizer: Any = hub.load(CLIPTokenizer, base, subfolder="tokenizer")
        # fp32: text encoders are small and run once
        model = hub.load(CLIPTextModel, base, subfolder="text_encoder", dtype=torch.float32)
        self.model: Any = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Per text `{"embedding": (L, D)}` in fp32 on the CPU; longer texts are cut to what the encoder reads."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        embeddings_BLD = self.model(tokens.input_ids.to(self.device))[0]
        return [{"embedding": embedding.contiguous()} for embedding in embeddings_BLD.float().cpu()]

    def lost(self, text: str) -> str:
        """The tail of `text` that the encoder never sees; empty if all of it fits."""
        room = self.tokenizer.model_max_length - 2  # begin and end marks take two places
        ids = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return str(self.tokenizer.decode(ids[room:])).strip() if len(ids) > room else ""


class Vae:
    """A frozen autoencoder; its latents are shifted and scaled as the UNet wants them."""

    def __init__(self, base: str, device: torch.device) -> None:
        from diffusers import AutoencoderKL

        self.identity = vae_identity(base)
        self.device = device
        # fp32: several released autoencoders overflow in fp16, and encoding happens once.
        model = hub.load(AutoencoderKL, base, subfolder="vae", torch_dtype=torch.float32)
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.shift = float(self.model.config.shift_factor or 0.0)
        self.scale = float(self.model.config.scaling_factor)

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor) -> list[dict[str, Tensor]]:
        """Per picture (values in -1 … 1) `{"mean", "std"}`, each (C, h, w) fp32 on the CPU.

        Training draws new latents from them at each visit.
        """
        posterior = self.model.encode(pixels_B3HW.to(self.device)).latent_dist
        mean_BChw = (posterior.mean - self.shift) * self.scale
        std_BChw = posterior.std * self.scale
        return [
            {"mean": mean.contiguous(), "std": std.contiguous()}
            for mean, std in zip(mean_BChw.float().cpu(), std_BChw.float().cpu(), strict=True)
        ]


def text_identity(base: str) -> str:
    """Identity of the text encoder for cache keys, known without loading it."""
    return hub.identity(base, "text_encoder", "tokenizer")


def vae_identity(base: str) -> str:
    """Identity of the autoencoder for cache keys, known without loading it."""
    return hub.identity(base, "vae")


def load_text_encoder(base: str, device: torch.device) -> TextEncoder:
    """The base's text encoder. Raises ModelError."""
    return TextEncoder(base, device)


def load_vae(base: str, device: torch.device) -> Vae:
    """The base's autoencoder. Raises ModelError."""
    return Vae(base, device)


def load_unet(base: str, dtype: torch.dtype) -> nn.Module:
    """The base's frozen UNet2DConditionModel on the CPU."""
    from diffusers import UNet2DConditionModel

    unet: nn.Module = hub.load(UNet2DConditionModel, base, subfolder="unet", torch_dtype=dtype)
    return unet.requires_grad_(False)


def load_scheduler(base: str) -> Any:
    """The base's noise scheduler, with its own prediction type and noise levels."""
    from diffusers import StableDiffusionPipeline

    # A pipeline without weights: reads model_index.json and so finds the scheduler's class by itself.
    return hub.load(
        StableDiffusionPipeline,
        base,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=None,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).scheduler


class Painter:
    """Draws pictures with any UNet of one base.

    Prompt embeddings and autoencoder are loaded once, the text encoder is dropped again. The same
    prompt and seed start from the same noise whatever the UNet, the batch or the device.
    """

    def __init__(
        self, base: str, prompts: Sequence[str], negative: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        from diffusers import AutoencoderKL

        encoder = load_text_encoder(base, device)
        self.embeddings = {
            text: encoded["embedding"].to(dtype)
            for text, encoded in zip([*prompts, negative], encoder.encode([*prompts, negative]), strict=True)
        }
        self.negative, self.device, self.dtype = negative, device, dtype
        self.scheduler = load_scheduler(base)
        self.vae = (
            hub.load(AutoencoderKL, base, subfolder="vae", torch_dtype=torch.float32).eval().requires_grad_(False)
        )

    @torch.no_grad()
    def draw(
        self,
        unet: nn.Module,
        jobs: Sequence[tuple[str, int]],
        *,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        batch: int = 8,
    ) -> list[Any]:
        """One PIL picture for each (prompt, seed); prompts must be among those given at construction."""
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=self.vae.to(self.device),
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        training = unet.training
        unet.eval()
        pictures: list[Any] = []
        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
                latents_BChw = pipeline(
                    prompt_embeds=torch.stack([self.embeddings[prompt] for prompt, _ in part]).to(self.device),
                    negative_prompt_embeds=torch.stack([self.embeddings[self.negative]] * len(part)).to(self.device),
                    generator=[torch.Generator().manual_seed(seed) for _, seed in part],
                    width=width,
                    height=height,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    output_type="latent",
                ).images
            shift, scale = float(self.vae.config.shift_factor or 0.0), float(self.vae.config.scaling_factor)
            pixels_B3HW = self.vae.decode(latents_BChw.float() / scale + shift).sample
            pictures += pipeline.image_processor.postprocess(pixels_B3HW, output_type="pil")
        unet.train(training)
        self.vae.to("cpu")  # the training step needs the memory
        return pictures
