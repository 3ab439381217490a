"""Draws images with any backbone of one base.

B images, 3 colours, H×W pixels.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from finetune.config.schema import ModelConfig
from finetune.diffusion import tiling
from finetune.diffusion.families import family
from finetune.diffusion.families.spec import Text
from finetune.diffusion.pipeline import TextEncoder, first_use, load_pipeline, load_vae_model
from finetune.memory.fallbacks import AdaptiveBatch
from finetune.run.progress import say

IMAGE_BATCH = 8
FULL_PASS = 512**2  # pixels: with fewer, most processors are not busy


def images_at_once(side: int, least: int) -> int:
    """How many images of `side` pixels are drawn in one pass: `least`, or more where they are small."""
    return min(IMAGE_BATCH, max(least, FULL_PASS // side**2))


class ImageSampler:
    """Draws images with any backbone of one base.

    Prompt embeddings and autoencoder are loaded once, the text encoders are dropped again. The same
    prompt and seed start from the same noise whatever the backbone, the batch or the device. Where memory runs out it
    draws fewer at once, and at last decodes in tiles, from then on.
    """

    def __init__(
        self,
        model: ModelConfig,
        prompts: Sequence[str],
        negative: str,
        device: torch.device,
        dtype: torch.dtype,
        encoder: TextEncoder | None = None,
    ) -> None:
        """encoder: one that the caller keeps, to `read` other texts with later."""
        self.family, self.base = family(model.family), model.base
        self.device, self.dtype = device, dtype
        self.read(prompts, negative, encoder or TextEncoder(model, device))
        self.adaptive_batch = AdaptiveBatch(IMAGE_BATCH, self._tile, doing="drawing")
        self.vae = load_vae_model(model)
        parts = dict.fromkeys((self.family.backbone, *self.family.text_parts)) | {"vae": self.vae}
        self.pipeline = load_pipeline(model, parts)
        self.proven = False

    def read(self, prompts: Sequence[str], negative: str, encoder: TextEncoder) -> None:
        """Take these prompts from now on instead of those before. `truncated` then says what isn't read of them."""
        texts = [*prompts, negative]
        self.texts = dict(zip(texts, encoder.encode(texts), strict=True))
        self.truncated = {text: tail for text in self.texts if (tail := encoder.truncated_tail(text))}
        self.negative = negative

    def generate(
        self,
        backbone: nn.Module,
        jobs: Sequence[tuple[str, int]],
        *,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """One PIL image for each (prompt, seed); prompts must be among those that were read.

        on_step: called after each denoising step of each batch; what it raises ends the work. Raises
        torch.OutOfMemoryError where one image is too much, in tiles too.
        """
        if max(width, height) <= tiling.TILE:  # tiles would be the image
            self.adaptive_batch.fallbacks.clear()
        with (
            nullcontext() if self.proven else first_use(self.base, f"{self.family.backbone}, scheduler or autoencoder")
        ):
            images = self.adaptive_batch.each(
                lambda part: self._generate(backbone, part, width, height, steps, guidance, on_step), jobs
            )
        self.proven = True
        return images

    def _tile(self) -> None:
        say("the GPU is too small for an image; decoding in tiles")
        tiling.enable_tiling(self.vae)

    @torch.no_grad()
    def _generate(
        self,
        backbone: nn.Module,
        jobs: Sequence[tuple[str, int]],
        width: int,
        height: int,
        steps: int,
        guidance: float,
        on_step: Callable[[], None],
    ) -> list[Any]:
        def after_step(_pipeline: Any, _step: int, _timestep: Any, changed: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return changed

        pipeline = self.pipeline
        pipeline.register_modules(**{self.family.backbone: backbone})
        training = backbone.training
        backbone.eval()
        try:
            self.vae.to(self.device)
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
                latents = pipeline(
                    **self.family.pipeline_arguments(
                        self._stacked([prompt for prompt, _ in jobs]),
                        self._stacked([self.negative] * len(jobs)),
                        guidance,
                    ),
                    generator=[torch.Generator().manual_seed(seed) for _, seed in jobs],
                    width=width,
                    height=height,
                    num_inference_steps=steps,
                    output_type="latent",
                    callback_on_step_end=after_step,
                ).images
            pixels_B3HW = self.family.decode(self.vae, latents.float(), height, width)
            return list(pipeline.image_processor.postprocess(pixels_B3HW, output_type="pil"))
        finally:  # also where memory ran out
            backbone.train(training)
            pipeline.register_modules(**{self.family.backbone: None})  # whose memory is free once the caller drops it
            self.vae.to("cpu")  # the training step needs the memory

    def _stacked(self, texts: Sequence[str]) -> Text:
        first = self.texts[texts[0]]
        return {
            name: torch.stack([self.texts[text][name] for text in texts]).to(self.device, self.dtype) for name in first
        }
