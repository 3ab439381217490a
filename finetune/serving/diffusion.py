"""An image model as an engine: text encoders, backbone and autoencoder loaded once, one adapter at work in each job."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import APIRouter

from finetune.adapters import lora
from finetune.config.schema import Config, ModelConfig
from finetune.diffusion.families import family
from finetune.diffusion.image_sampler import ImageSampler
from finetune.diffusion.pipeline import TextEncoder, base_hash, load_backbone
from finetune.memory.device import pick_device, pick_dtype
from finetune.planning.machine import present
from finetune.serving.adapters import BaseIdentity, Shelf, Source, most_bytes
from finetune.serving.attachments import Attachments
from finetune.serving.fairness import Rates
from finetune.serving.image_engine import ImageEngine, ImageRequest
from finetune.serving.image_memory import encoders_fit
from finetune.serving.image_routes import Canvas, routes
from finetune.serving.metrics import Metrics
from finetune.serving.requests import BASE

T = TypeVar("T")
MOST_ADAPTERS = 8  # that stay loaded


class ImageServer:
    """A base with its engine and adapters."""

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        encoders_on: torch.device,
        vram_gib: float,
        most_waiting: int,
    ) -> None:
        """encoders_on: where the text encoders work. Raises ModelError for a base that can't be loaded."""
        self.encoder = TextEncoder(model, encoders_on)
        self.sampler = ImageSampler(model, [], "", device, dtype, self.encoder)
        self.backbone: Any = load_backbone(model, dtype, device, vram_gib=vram_gib)
        self.identity = BaseIdentity(model.base, base_hash(model), "")
        self.attachments = Attachments(self.backbone)
        self.engine = ImageEngine(self, most_waiting=most_waiting)

    def draw(self, request: ImageRequest, on_step: Callable[[], None]) -> tuple[Sequence[Any], str]:
        """See `image_engine.Painter`."""
        self.sampler.read([request.prompt], request.negative, self.encoder)
        cut = self.encoder.truncated_tail(request.prompt)
        for _, layer in lora.lora_layers(self.backbone):
            layer.set_adapter([] if request.adapter == BASE else request.adapter, inference_mode=True)
        with lora.disabled(self.backbone) if request.adapter == BASE else nullcontext():
            images = self.sampler.generate(
                self.backbone,
                [(request.prompt, seed) for seed in request.seeds],
                width=request.width,
                height=request.height,
                steps=request.steps,
                guidance=request.guidance,
                on_step=on_step,
            )
        return images, cut

    async def between_steps(self, work: Callable[[], T]) -> T:
        """See `adapters.Holder`."""
        return await self.engine.between_steps(work)

    def load_adapter(self, folder: Path, key: str) -> None:
        """See `adapters.Holder`."""
        self.attachments.load(folder, key)

    def drop_adapter(self, key: str) -> None:
        """See `adapters.Holder`."""
        self.attachments.drop(key)


def service(config: Config, sources: Mapping[str, Source]) -> "ImageService":
    """The service of a recipe. Raises ModelError, and ConfigError where it doesn't fit."""
    device = pick_device(config.hardware.device)
    dtype, encoders_on = pick_dtype(config.trainer.precision, device), device
    machine, adapters = present(config.hardware), most_bytes(sources.values(), MOST_ADAPTERS)
    if machine and not encoders_fit(config.model, config.sample, dtype, machine, adapters):
        encoders_on = torch.device("cpu")
    server = ImageServer(
        config.model,
        device,
        dtype,
        encoders_on=encoders_on,
        vram_gib=config.hardware.vram_gib,
        most_waiting=config.serve.queue,
    )
    canvas = Canvas(
        side=config.model.resolution,
        multiple=config.model.bucket_step,
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        negative=config.sample.negative,
        takes_negative=family(config.model.family).takes_negative,
        prompt=next(iter(config.sample.prompts), config.caption.trigger or "a house on a hill"),
        most_images=config.serve.batch,
        timeout_s=config.serve.timeout_s,
    )
    rates = Rates(config.serve.requests_per_minute, 0)
    return ImageService(server, sources, canvas, rates)


class ImageService:
    """See `app.Service`."""

    main_page = "images"
    leaves_a_core = False

    def __init__(self, server: ImageServer, sources: Mapping[str, Source], canvas: Canvas, rates: Rates) -> None:
        self.server, self.canvas, self.rates = server, canvas, rates
        self.shelf = Shelf(sources, server, base=server.identity, most=MOST_ADAPTERS)
        self.metrics = Metrics(server.engine.stats)

    def routes(self) -> APIRouter:
        """See `app.Service`."""
        return routes(self.server.engine, self.shelf, self.canvas, self.rates, self.metrics)

    def examples(self, url: str, key: str) -> Sequence[str]:
        """See `app.Service`."""
        body = shlex.quote(json.dumps({"prompt": self.canvas.prompt, "seed": 0}))
        bearer = f" -H 'Authorization: Bearer {key}'" if key else ""
        write = "import base64, json, sys; sys.stdout.buffer.write("
        write += 'base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))'
        ask = f"curl {url}/v1/images/generations -H 'Content-Type: application/json'{bearer} -d {body}"
        client = f"openai.OpenAI(base_url={url + '/v1'!r}, api_key={key or 'none'!r})"
        return (
            f"{ask} | python -c {shlex.quote(write)} > image.png",
            f"{client}.images.generate(model={self.shelf.default!r}, prompt={self.canvas.prompt!r})",
        )

    def close(self) -> None:
        """See `app.Service`."""
        self.server.engine.close()
