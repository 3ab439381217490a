"""The route of an image model: OpenAI's `/v1/images/generations`."""

import asyncio
import base64
import io
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from finetune.config.rules import LARGEST_SEED
from finetune.diffusion.sample import save_png
from finetune.serving.adapters import Loaded, Shelf
from finetune.serving.fairness import Rates
from finetune.serving.forms import Form, Number
from finetune.serving.http import ENDED, Events, client_of, event, finished, headers_of
from finetune.serving.image_engine import Drawn, ImageEngine, ImageRequest
from finetune.serving.metrics import Metrics
from finetune.serving.requests import Finish, Refused

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
MOST_STEPS = 200
LARGEST = 4  # times the pixels that the model was trained with
LONGEST_PROMPT = 4000  # characters; encoders read some 77 to 512 tokens


@dataclass(frozen=True)
class Canvas:
    """What holds where a request says nothing. side: pixels. multiple: sides are of it. most_images: of a request.

    takes_negative: whether the base looks at a negative prompt at all. prompt: an example.
    """

    side: int
    multiple: int
    steps: int
    guidance: float
    negative: str
    takes_negative: bool
    prompt: str
    most_images: int
    timeout_s: float


class Generation(Form):
    """Body of /v1/images/generations; seed, steps, guidance and negative_prompt are not OpenAI's."""

    prompt: Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)]
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    stream: bool = False
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    guidance: Annotated[Number, Field(ge=0, le=100)] | None = None
    negative_prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)] | None = None

    def sides(self, canvas: Canvas) -> tuple[int, int]:
        """Width and height, pixels. Raises Refused for sides that the model can't draw, or that are too large."""
        if self.size in (None, "auto"):
            return canvas.side, canvas.side
        match = SIZE.fullmatch(str(self.size))
        width, height = (int(match[1]), int(match[2])) if match else (0, 0)
        wrong = width % canvas.multiple or height % canvas.multiple
        if not match or wrong or width * height > LARGEST * canvas.side**2:
            raise Refused(
                400,
                f"size takes WIDTHxHEIGHT in multiples of {canvas.multiple} pixels, of {LARGEST * canvas.side**2:,} "
                f"pixels at most, such as {canvas.side}x{canvas.side}",
                code="invalid_value",
                param="size",
            )
        return width, height


def routes(engine: ImageEngine, shelf: Shelf, canvas: Canvas, rates: Rates, metrics: Metrics) -> APIRouter:
    """All of them."""
    router = APIRouter()

    @router.get("/api/image_settings")
    async def image_settings() -> dict[str, Any]:
        """What a page begins with."""
        return {
            "prompt": canvas.prompt,
            "negative_prompt": canvas.negative,
            "steps": canvas.steps,
            "guidance": canvas.guidance,
            "size": f"{canvas.side}x{canvas.side}",
        }

    @router.post("/v1/images/generations")
    async def generations(form: Generation, request: Request) -> Response:
        rates.use(client_of(request), "requests", 1)
        wanted = form.n or 1
        if wanted > canvas.most_images:
            raise Refused(400, f"n is at most {canvas.most_images} here (serve.batch)", code="invalid_value", param="n")
        width, height = form.sides(canvas)
        first = secrets.randbits(31) if form.seed is None else form.seed
        async with AsyncExitStack() as stack:
            loaded = await stack.enter_async_context(shelf.using(form.model or shelf.default))
            asked = ImageRequest(
                prompt=form.prompt,
                negative=canvas.negative if form.negative_prompt is None else form.negative_prompt,
                adapter=loaded.key,
                seeds=tuple((first + index) % (LARGEST_SEED + 1) for index in range(wanted)),
                steps=form.steps or canvas.steps,
                guidance=canvas.guidance if form.guidance is None else form.guidance,
                width=width,
                height=height,
                timeout_s=canvas.timeout_s,
                client=client_of(request),
            )
            job = engine.submit(asked)
            stack.callback(job.cancel)
            news = metrics.timed(job)
            warnings = [f"ignored: {', '.join(form.ignored())}"] if form.ignored() else []
            if asked.negative and not canvas.takes_negative:
                warnings.append("this base takes no negative_prompt")
            elif asked.negative and asked.guidance <= 1:
                warnings.append("negative_prompt is not looked at without guidance above 1")
            if form.stream:
                return Events(_events(news, asked, loaded), headers_of(loaded, warnings), stack.pop_all())
            last = await finished(news, request)
            if last.cut:
                warnings.append(_cut(last))
            answer = await asyncio.to_thread(_answer, last, asked, loaded)
            return JSONResponse(answer, headers=headers_of(loaded, warnings))
        raise AssertionError("unreachable")

    return router


async def _events(news: AsyncIterator[Drawn], asked: ImageRequest, loaded: Loaded) -> AsyncIterator[str]:
    """Progress after every step, then every image as OpenAI sends it."""
    async for drawn in news:
        if drawn.finish in ENDED:
            yield event(ENDED[drawn.finish]().body())
        elif drawn.finish is None:
            yield event({"type": "image_generation.progress", "step": drawn.step, "steps": drawn.steps})
        else:
            answer = await asyncio.to_thread(_answer, drawn, asked, loaded)
            facts = {"type": "image_generation.completed", "created_at": answer["created"], "size": answer["size"]}
            if drawn.cut:
                facts["warning"] = _cut(drawn)
            for image in answer["data"]:
                yield event(facts | _facts(asked, image["seed"], loaded) | image)
    yield event("[DONE]")


def _cut(drawn: Drawn) -> str:
    return f"the end of the prompt is too much for this model: {drawn.cut}"


def _answer(drawn: Drawn, asked: ImageRequest, loaded: Loaded) -> dict[str, Any]:
    """OpenAI's answer, with what made each image beside it, and within its file."""
    assert drawn.finish is Finish.stop
    data = []
    for seed, image in zip(asked.seeds, drawn.images, strict=True):
        file = io.BytesIO()
        save_png(image, file, _facts(asked, seed, loaded))
        data.append({"b64_json": base64.b64encode(file.getvalue()).decode(), "seed": seed})
    return {
        "created": int(time.time()),
        "data": data,
        "output_format": "png",
        "size": f"{asked.width}x{asked.height}",
        "model": loaded.model,
        "system_fingerprint": loaded.content,
    }


def _facts(asked: ImageRequest, seed: int, loaded: Loaded) -> dict[str, str]:
    """What made an image, as it is noted in its file."""
    return {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative,
        "seed": str(seed),
        "steps": str(asked.steps),
        "guidance": str(asked.guidance),
        "model": loaded.model,
        "content": loaded.content,
    }
