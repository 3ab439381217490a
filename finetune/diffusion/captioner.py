"""Captioners: models that say in words what an image shows. `CAPTIONERS` lists those that can be loaded.

B images, N beams of all images, 3 colours, H×W the side that the captioner reads, L patches, D width, T tokens.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from finetune import hub
from finetune.config.schema import CaptionConfig
from finetune.errors import ModelError
from finetune.planning.meta import on_meta

START_TOKENS = 2  # of BLIP's decoder, before and behind a caption


class Captioner(Protocol):
    """A frozen captioning model. dtype: of weights and pixels. Raises ModelError where it can't be loaded."""

    def __init__(self, settings: CaptionConfig, device: torch.device, dtype: torch.dtype) -> None: ...

    def read(self, image: Image.Image) -> Tensor:
        """An RGB image as the model sees it, in CPU memory. Called from several threads."""
        ...

    def caption(self, images: Sequence[Tensor]) -> list[str]:
        """One caption for each image that was `read`; nothing is drawn at random."""
        ...

    @staticmethod
    def load_readers(reference: str) -> Any:
        """What turns images into pixels and tokens into words. Raises ModelError where it can't be loaded."""
        ...

    @staticmethod
    def trace_step(model: Any, *, batch: int, beams: int, new_tokens: int) -> None:
        """Run a `model_without_weights` as far as captioning so many images takes the most memory."""
        ...


def load_captioner(settings: CaptionConfig, device: torch.device, dtype: torch.dtype) -> Captioner:
    """The captioner `settings.model`: embedded, a local folder or a hub id.

    Raises ModelError, also for a model that is none of `CAPTIONERS`.
    """
    from transformers import AutoConfig

    _require_files(settings.model)
    model_type = hub.load(AutoConfig, settings.model).model_type
    return _captioner(settings.model, model_type)(settings, device, dtype)


def require(reference: str) -> None:
    """Raises ModelError for a captioner that can't be loaded, as far as no hub needs to be asked; loads no weights."""
    from transformers import AutoConfig

    _require_files(reference)
    if isinstance(hub.resolve(reference), Path):  # what is to be downloaded is seen then
        _captioner(reference, hub.load(AutoConfig, reference).model_type).load_readers(reference)


def _require_files(reference: str) -> None:
    hub.require(reference, "config.json")
    hub.require_weights(reference, "")


def model_without_weights(reference: str, dtype: torch.dtype) -> nn.Module:
    """The captioner's model on the meta device, from its configuration alone; no hub is asked. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    hub.require(reference, "config.json")
    config = hub.load(AutoConfig, str(hub.config_folder(reference)))
    _captioner(reference, config.model_type)
    with hub.explained(lambda reason: f"the config.json of {reference} describes no captioner ({reason})"):
        return on_meta(lambda: AutoModelForImageTextToText.from_config(config), dtype).eval()


def trace_step(model: Any, *, batch: int, beams: int, new_tokens: int) -> None:
    """See `Captioner.trace_step`."""
    CAPTIONERS[model.config.model_type].trace_step(model, batch=batch, beams=beams, new_tokens=new_tokens)


def _captioner(reference: str, model_type: str) -> type[Captioner]:
    if model_type not in CAPTIONERS:
        raise ModelError(
            f"{reference} is a {model_type} model; captions are made by: {', '.join(CAPTIONERS)}; "
            "try caption=embedded or caption=blip_base"
        )
    return CAPTIONERS[model_type]


def download_bytes(reference: str) -> dict[str, float]:
    """By hub id the bytes of a captioner whose weights aren't on this machine; they are released in fp32."""
    if not hub.to_download(reference, ""):
        return {}
    weights = model_without_weights(reference, torch.float32).parameters()
    return {reference: float(sum(weight.nbytes for weight in weights))}


class Blip:
    """BLIP (arXiv 2201.12086): the small one that comes with the package or any released one."""

    def __init__(self, settings: CaptionConfig, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import BlipForConditionalGeneration

        self.device, self.dtype, self.reference = device, dtype, settings.model
        self.tokenizer, self.processor = self.load_readers(settings.model)
        model = hub.load(BlipForConditionalGeneration, settings.model, dtype=dtype)
        self.model: Any = model.to(device).eval().requires_grad_(False)
        room = model.config.text_config.max_position_embeddings - START_TOKENS
        self.limits = {"max_new_tokens": min(settings.max_new_tokens, room), "num_beams": settings.num_beams}

    def read(self, image: Image.Image) -> Tensor:
        """See `Captioner`; (1, 3, H, W)."""
        with self._explained():
            pixels_13HW: Tensor = self.processor(images=image, return_tensors="pt").pixel_values
        return pixels_13HW

    @torch.no_grad()
    def caption(self, images: Sequence[Tensor]) -> list[str]:
        """See `Captioner`."""
        with self._explained():
            pixels_B3HW = torch.cat(list(images)).to(self.device, self.dtype)
            ids_BT = self.model.generate(pixel_values=pixels_B3HW, do_sample=False, **self.limits)
            texts = self.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _explained(self) -> AbstractContextManager[None]:
        return hub.explained(lambda reason: f"the captioner {self.reference} doesn't work ({reason}); get it again")

    @staticmethod
    def load_readers(reference: str) -> tuple[Any, Any]:
        """See `Captioner`."""
        from transformers import AutoTokenizer, BlipImageProcessorPil

        # The PIL backend on purpose: the same pixels whether torchvision is installed or not.
        return hub.load(AutoTokenizer, reference), hub.load(BlipImageProcessorPil, reference)

    @staticmethod
    def trace_step(model: Any, *, batch: int, beams: int, new_tokens: int) -> None:
        """See `Captioner`."""
        side, text, rows = model.config.vision_config.image_size, model.config.text_config, batch * beams
        pixels_B3HW = torch.empty(batch, 3, side, side, dtype=model.dtype)
        image_NLD = model.vision_model(pixel_values=pixels_B3HW).last_hidden_state.repeat_interleave(beams, dim=0)
        length = new_tokens + image_NLD.shape[1]  # keys and values of every token written, and of the image
        _cache = [
            torch.empty(rows, length, text.hidden_size, dtype=model.dtype) for _ in range(2 * text.num_hidden_layers)
        ]
        model.text_decoder(
            input_ids=torch.zeros(rows, 1, dtype=torch.long),
            encoder_hidden_states=image_NLD,
            encoder_attention_mask=torch.ones(image_NLD.shape[:2], dtype=torch.long),
        )


CAPTIONERS: dict[str, type[Captioner]] = {
    "blip": Blip,
}
"""By the `model_type` of a model's config.json."""
