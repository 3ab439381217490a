"""What `finetune bench` measures: the embedded models at work, as the other commands use them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from finetune.config import compose
from finetune.config.schema import Device, Precision
from finetune.diffusion.image_sampler import ImageSampler
from finetune.diffusion.pipeline import load_backbone
from finetune.language.causal_lm import load_model
from finetune.memory.device import DTYPES, pick_device, pick_precision
from finetune.workstation import large_speeds, training_speeds
from finetune.workstation.measuring import Measure, Meter, Speed, generation, now

PROMPT_TOKENS, NEW_TOKENS = 256, 128  # the embedded model reads 512 in all
PROMPT = "a big red robot in a city"
TEXT_MODEL, IMAGE_MODEL = ("pirate_chat", ["model=embedded_language"]), ("pixar_style", ["model=embedded"])


def every_measurement() -> list[Measure]:
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
        *training_speeds.every_measurement(device, default),
        *(large_speeds.every_measurement(device) if device.type == "cuda" else ()),
    ]


def text(repeats: int, *, precision: Precision, device: torch.device) -> Iterator[Speed]:
    """Of one text by the embedded model; see `generation`."""
    model = load_model(compose.load(*TEXT_MODEL).model, DTYPES[precision], device)
    yield from generation(
        repeats, model, f"text-{precision.name}", device, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS
    )


def image(repeats: int, *, attention: str, precision: Precision, device: torch.device) -> Iterator[Speed]:
    """Seconds for one image, decoding included; the attention is torch's own kernel, or plain products."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    config = compose.load(*IMAGE_MODEL)
    model, how, side = config.model, config.sample, config.model.resolution
    sampler = ImageSampler(model, [PROMPT], "", device, DTYPES[precision])
    backbone: Any = load_backbone(model, DTYPES[precision], device)
    backbone.set_attn_processor(AttnProcessor2_0() if attention == "efficient" else AttnProcessor())
    seconds, meter = [], Meter(device)
    for seed in range(1 + repeats):
        if seed == 1:
            meter.start()
        began = now(device)
        sampler.generate(backbone, [(PROMPT, seed)], width=side, height=side, steps=how.steps, guidance=how.guidance)
        seconds.append(now(device) - began)
    name = f"image-{side}px-{attention}"
    yield Speed(name, "s an image", False, tuple(seconds[1:]))
    yield from meter.energy(name, "image", repeats)
