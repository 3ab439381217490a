"""What `finetune bench` measures: the embedded models at work, as the other commands use them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from finetune.config import compose
from finetune.config.schema import Device, Precision, Quantize
from finetune.diffusion.image_sampler import ImageSampler
from finetune.diffusion.pipeline import load_backbone
from finetune.errors import ModelError
from finetune.language.causal_lm import load_model
from finetune.memory.device import DTYPES, pick_device, pick_precision
from finetune.run.progress import say
from finetune.workstation import large_speeds, training_speeds
from finetune.workstation.measuring import Measure, Meter, Speed, generation, now, rounds

PROMPT_TOKENS, GPU_TOKENS, CPU_TOKENS = 256, 128, 32  # the embedded model reads 512 in all
PROMPT = "a big red robot in a city"
TEXT_MODEL, IMAGE_MODEL = (
    ("pirate_chat", ["model=embedded_language"]),
    ("pixar_style", ["model=embedded", "sample.steps=10"]),
)


def every_measurement() -> dict[str, Measure]:
    """By name. Each takes a number of repeats, loads its model, warms it up once and yields its figures."""
    device = pick_device(Device.auto)
    default = pick_precision(Precision.auto, device)
    plain = dict.fromkeys((Precision.fp32, Precision.bf16, default))
    texts = [*((each, Quantize.none) for each in plain), (default, Quantize.int8), (default, Quantize.nf4)]
    found: dict[str, Measure] = {}
    for precision, quantize in texts:
        name = f"text-{(precision if quantize is Quantize.none else quantize).name}"
        found[name] = partial(text, name=name, precision=precision, quantize=quantize, device=device)
    for attention in ("efficient", "plain"):
        found[f"image-{attention}"] = partial(image, attention=attention, precision=default, device=device)
    found |= training_speeds.every_measurement(device, default)
    return found | (large_speeds.every_measurement(device) if device.type == "cuda" else {})


def text(
    repeats: int, *, name: str, precision: Precision, device: torch.device, quantize: Quantize = Quantize.none
) -> Iterator[Speed]:
    """Of one text by the embedded model; see `generation`. Nothing where bitsandbytes does not work on the device."""
    settings = replace(compose.load(*TEXT_MODEL).model, quantize=quantize)
    try:
        model = load_model(settings, DTYPES[precision], device)
    except ModelError as error:
        say(f"{name}: not on this machine ({error})")
        return
    new_tokens = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
    yield from generation(repeats, model, name, device, prompt_tokens=PROMPT_TOKENS, new_tokens=new_tokens)


def image(repeats: int, *, attention: str, precision: Precision, device: torch.device) -> Iterator[Speed]:
    """Seconds for one image, decoding included; the attention is torch's own kernel, or plain products."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    config = compose.load(*IMAGE_MODEL)
    model, how, side = config.model, config.sample, config.model.resolution
    sampler = ImageSampler(model, [PROMPT], "", device, DTYPES[precision])
    backbone: Any = load_backbone(model, DTYPES[precision], device)
    backbone.set_attn_processor(AttnProcessor2_0() if attention == "efficient" else AttnProcessor())
    seconds, meter = [], Meter(device)
    for seed in rounds(repeats):
        if seed == 1:
            meter.start()
        began = now(device)
        sampler.generate(backbone, [(PROMPT, seed)], width=side, height=side, steps=how.steps, guidance=how.guidance)
        seconds.append(now(device) - began)
    name = f"image-{side}px-{attention}"
    yield Speed(name, "s an image", False, tuple(seconds[1:]))
    yield from meter.energy(name, "image", seed)
