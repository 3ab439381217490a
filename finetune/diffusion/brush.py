"""Images with a model and its adapter, from Python."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from finetune.adapters import lora
from finetune.config.schema import ModelConfig, SampleConfig
from finetune.diffusion.image_sampler import ImageSampler
from finetune.diffusion.pipeline import TextEncoder, load_adapter, load_backbone


class Brush:
    """Call it with a prompt; it returns a PIL image."""

    def __init__(
        self,
        model: ModelConfig,
        settings: SampleConfig,
        adapter: Path,
        device: torch.device,
        dtype: torch.dtype,
        vram_gib: float,
    ) -> None:
        """Raises ModelError for a base that can't be loaded, and an adapter that doesn't fit."""
        self.settings, self.side = settings, model.resolution
        self._encoder = TextEncoder(model, device)
        self._sampler = ImageSampler(model, [], settings.negative, device, dtype, self._encoder)
        backbone: Any = load_backbone(model, dtype, device, vram_gib=vram_gib)
        self._backbone = load_adapter(model, backbone, adapter)

    def __call__(
        self, prompt: str, *, seed: int = 0, tuned: bool = True, steps: int | None = None, guidance: float | None = None
    ) -> Any:
        """The image. tuned: False asks the base. steps, guidance: those of the recipe where they are not given."""
        self._sampler.read([prompt], self.settings.negative, self._encoder)
        with nullcontext() if tuned else lora.disabled(self._backbone):
            (image,) = self._sampler.generate(
                self._backbone,
                [(prompt, seed)],
                width=self.side,
                height=self.side,
                steps=self.settings.steps if steps is None else steps,
                guidance=self.settings.guidance if guidance is None else guidance,
            )
        return image
