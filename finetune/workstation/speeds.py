"""What `finetune bench` measures: the embedded models at work, as the other commands use them.

B texts, L tokens.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from finetune.config import compose
from finetune.config.schema import Device, Precision
from finetune.diffusion.image_sampler import ImageSampler
from finetune.diffusion.pipeline import load_backbone
from finetune.language.causal_lm import load_model
from finetune.memory.device import DTYPES, pick_device, pick_precision

PROMPT_TOKENS, NEW_TOKENS = 256, 128  # the embedded model reads 512 in all
PROMPT = "a big red robot in a city"
TEXT_MODEL, IMAGE_MODEL = ("pirate_chat", ["model=embedded_language"]), ("pixar_style", ["model=embedded"])


@dataclass(frozen=True)
class Speed:
    """One figure. id: stable, to be compared. values: one of each repeat, in `unit`."""

    id: str
    unit: str
    more_is_better: bool
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)


def every_measurement() -> list[Callable[[int], Iterator[Speed]]]:
    """Each takes a number of repeats, loads its model, warms it up once and yields its figures."""
    device = pick_device(Device.auto)
    default = pick_precision(Precision.auto, device)
    precisions = dict.fromkeys((Precision.fp32, Precision.bf16, default))
    return [
        *(partial(text, precision=precision, device=device) for precision in precisions),
        *(
            partial(image, attention=attention, precision=default, device=device)
            for attention in ("efficient", "plain")
        ),
    ]


def text(repeats: int, *, precision: Precision, device: torch.device) -> Iterator[Speed]:
    """Time to the first token behind a prompt, and tokens a second from then on, of one text."""
    from transformers import GenerationConfig

    model: Any = load_model(compose.load(*TEXT_MODEL).model, DTYPES[precision], device)
    ids_BL = torch.randint(3, model.config.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    first_ms, per_second = [], []
    for _ in range(1 + repeats):
        times: list[float] = []

        def note(_ids_BL: torch.Tensor, scores_BV: torch.Tensor, times: list[float] = times) -> torch.Tensor:
            times.append(_now(device))
            return scores_BV

        began = _now(device)
        model.generate(
            ids_BL.to(device),
            attention_mask=torch.ones_like(ids_BL, device=device),
            generation_config=settings,
            logits_processor=[note],
        )
        first_ms.append(1000 * (times[0] - began))
        per_second.append((len(times) - 1) / (times[-1] - times[0]))
    name = f"text-{precision.name}"
    yield Speed(f"{name}-pp{PROMPT_TOKENS}", "ms to first token", False, tuple(first_ms[1:]))
    yield Speed(f"{name}-tg{NEW_TOKENS}", "tokens/s", True, tuple(per_second[1:]))


def image(repeats: int, *, attention: str, precision: Precision, device: torch.device) -> Iterator[Speed]:
    """Seconds for one image, decoding included; the attention is torch's own kernel, or plain products."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    config = compose.load(*IMAGE_MODEL)
    model, how, side = config.model, config.sample, config.model.resolution
    sampler = ImageSampler(model, [PROMPT], "", device, DTYPES[precision])
    backbone: Any = load_backbone(model, DTYPES[precision], device)
    backbone.set_attn_processor(AttnProcessor2_0() if attention == "efficient" else AttnProcessor())
    seconds = []
    for seed in range(1 + repeats):
        began = _now(device)
        sampler.generate(backbone, [(PROMPT, seed)], width=side, height=side, steps=how.steps, guidance=how.guidance)
        seconds.append(_now(device) - began)
    yield Speed(f"image-{side}px-{attention}", "s an image", False, tuple(seconds[1:]))


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
