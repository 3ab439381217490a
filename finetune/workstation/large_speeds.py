"""What `finetune bench` measures of released architectures on a GPU, with random weights: speed doesn't depend on them.

B images, with guidance two for each, C latent channels, h×w latent pixels, L text tokens, D text width.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from finetune.config import compose
from finetune.config.schema import ModelConfig
from finetune.diffusion import meta as image_parts
from finetune.language.meta import language_model
from finetune.memory.device import release_memory
from finetune.planning.machine import GIB
from finetune.workstation.measuring import Measure, Meter, Speed, generation, now, rounds

SPREAD = 0.02  # of the weights
STEPS, TEXT_TOKENS = 50, 77
VAE_FACTOR = 8
SIDE = 512  # pixels
NEEDED_GIB = {"sd21": 8, "llama2_7b": 16}  # of free GPU memory
PROMPT_TOKENS, NEW_TOKENS = 256, 128


def every_measurement(device: torch.device) -> list[Measure]:
    """Those for which the GPU has room."""
    free = torch.cuda.mem_get_info(device)[0] / GIB
    found: list[Measure] = []
    if free > NEEDED_GIB["sd21"]:
        model = compose.load("pixar_style", ["model=sd21"]).model
        for attention in ("efficient", "plain"):
            found.append(partial(image, name="sd21", model=model, side=SIDE, attention=attention, device=device))
    if free > NEEDED_GIB["llama2_7b"]:
        model = compose.load("pirate_chat", ["model=llama2_7b"]).model
        found.append(partial(text, name="llama2_7b", model=model, device=device))
    return found


def text(repeats: int, *, name: str, model: ModelConfig, device: torch.device) -> Iterator[Speed]:
    """Of one text in fp16; see `generation`."""
    release_memory()
    written = random_weights(language_model(model, torch.float16), device)
    yield from generation(repeats, written, f"{name}-fp16", device, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)


def image(
    repeats: int, *, name: str, model: ModelConfig, side: int, attention: str, device: torch.device
) -> Iterator[Speed]:
    """Seconds for one image of Stable Diffusion in fp16: the UNet with guidance, 50 times, and the decoding."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    release_memory()
    unet: Any = random_weights(image_parts.backbone(model, torch.float16), device)
    unet.set_attn_processor(AttnProcessor2_0() if attention == "efficient" else AttnProcessor())
    vae: Any = random_weights(image_parts.autoencoder(model), device)
    shape = (2, unet.config.in_channels, side // VAE_FACTOR, side // VAE_FACTOR)
    latents_BChw = torch.randn(shape, device=device, dtype=torch.float16)
    text_BLD = torch.randn(2, TEXT_TOKENS, unet.config.cross_attention_dim, device=device, dtype=torch.float16)
    seconds, meter = [], Meter(device)
    with torch.inference_mode():
        for number in rounds(repeats):
            if number == 1:
                meter.start()
            began = now(device)
            for step in range(STEPS):
                unet(latents_BChw, torch.full((2,), step, device=device), encoder_hidden_states=text_BLD)
            vae.decode(latents_BChw[:1].to(vae.dtype))
            seconds.append(now(device) - began)
    yield Speed(f"{name}-{side}px-{attention}", "s an image", False, tuple(seconds[1:]))
    yield from meter.energy(f"{name}-{side}px-{attention}", "image", number)


def random_weights(model: nn.Module, device: torch.device) -> nn.Module:
    """A model of the `meta` device, on a real one."""
    model = nn.Module.to_empty(model, device=device).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=SPREAD)
        for buffer in model.buffers():
            buffer.zero_()
    return model
