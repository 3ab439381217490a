"""Captions from images with BLIP (arXiv 2201.12086): the small one that comes with the package or any released one.

B images, 3 colours, H×W the side that the captioner reads, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from finetune import hub


class Captioner:
    """A frozen BLIP captioning model with its tokenizer and image processor.

    reference: `embedded:captioner`, a local folder or a hub id. dtype: of weights and pixels. Raises ModelError.
    """

    def __init__(self, reference: str, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

        self.device, self.dtype = device, dtype
        hub.require(reference, "config.json")
        self.tokenizer: Any = hub.load(AutoTokenizer, reference)
        # The PIL backend on purpose: the same pixels whether torchvision is installed or not.
        self.processor: Any = hub.load(BlipImageProcessorPil, reference)
        model = hub.load(BlipForConditionalGeneration, reference, dtype=dtype)
        self.model: Any = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def caption(self, images: Sequence[Image.Image], max_new_tokens: int, num_beams: int) -> list[str]:
        """One caption for each RGB image, of at most `max_new_tokens` tokens; nothing is drawn at random."""
        pixels_B3HW: Tensor = self.processor(images=list(images), return_tensors="pt").pixel_values
        ids_BT = self.model.generate(
            pixel_values=pixels_B3HW.to(self.device, self.dtype),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
        )
        texts = self.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
