"""What `finetune bench` measures of released architectures on a GPU, with random weights: speed doesn't depend on them.

B images, with guidance two for each, C latent channels, h×w latent pixels, L text tokens, D text width, O outputs and I
inputs of a layer.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.config import compose
from finetune.config.schema import ModelConfig, Quantize
from finetune.diffusion import meta as image_parts
from finetune.language.meta import language_model
from finetune.memory import quantize
from finetune.memory.device import release_memory
from finetune.planning.machine import GIB
from finetune.workstation.measuring import Measure, Meter, Speed, generation, now, rounds

SPREAD = 0.02  # of the weights
OUTLIERS = 6.0  # of activations: above it transformers lets 8 bit compute in 16 (arXiv 2208.07339, §3.2)
STEPS, TEXT_TOKENS = 50, 77
VAE_FACTOR = 8
SIDE = 512  # pixels
IMAGE_GIB, TEXT_GIB = 8, {Quantize.none: 16, Quantize.int8: 10, Quantize.nf4: 7}  # of free GPU memory
PROMPT_TOKENS, NEW_TOKENS = 256, 128


def every_measurement(device: torch.device) -> dict[str, Measure]:
    """Those for which the GPU has room, by name."""
    free = torch.cuda.mem_get_info(device)[0] / GIB
    found: dict[str, Measure] = {}
    if free > IMAGE_GIB:
        model = compose.load("pixar_style", ["model=sd21"]).model
        for attention in ("efficient", "plain"):
            name = f"sd21-{SIDE}px-{attention}"
            found[name] = partial(image, name=name, model=model, side=SIDE, attention=attention, device=device)
    for stored, needed in TEXT_GIB.items():
        if free > needed:
            model = compose.load("pirate_chat", ["model=llama2_7b"]).model
            name = f"llama2_7b-{'fp16' if stored is Quantize.none else stored.name}"
            found[name] = partial(text, name=name, model=model, stored=stored, device=device)
    return found


def text(repeats: int, *, name: str, model: ModelConfig, stored: Quantize, device: torch.device) -> Iterator[Speed]:
    """Of one text, computed in fp16; see `generation`."""
    release_memory()
    built = language_model(model, torch.float16)
    written = random_weights(built, device) if stored is Quantize.none else quantised(built, stored, device)
    yield from generation(repeats, written, name, device, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)


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
    yield Speed(name, "s an image", False, tuple(seconds[1:]))
    yield from meter.energy(name, "image", number)


def random_weights(model: nn.Module, device: torch.device) -> nn.Module:
    """A model of the `meta` device, on a real one."""
    model = nn.Module.to_empty(model, device=device).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=SPREAD)
        for buffer in model.buffers():
            buffer.zero_()
    return model


def quantised(model: nn.Module, how: Quantize, device: torch.device) -> nn.Module:
    """The same with the layers that `model.quantize` stores in 8 or 4 bits; those of one shape are alike."""
    head = cast(Any, model).get_output_embeddings()
    layers = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and layer is not head
    ]
    for parent, name, _ in layers:
        setattr(parent, name, nn.Identity())
    random_weights(model, device)
    drawn: dict[torch.Size, Tensor] = {}
    for parent, name, layer in layers:
        shape = layer.weight.shape
        if shape not in drawn:
            drawn[shape] = torch.empty(shape, dtype=torch.float16, device=device).normal_(std=SPREAD).cpu()
        setattr(parent, name, _stored(layer, drawn[shape], how, device))
    return model


def _stored(layer: nn.Linear, weight_OI: Tensor, how: Quantize, device: torch.device) -> nn.Module:
    """As transformers makes it of a released model. weight_OI: on the CPU, from where bitsandbytes quantises."""
    import bitsandbytes as bnb

    settings = quantize.settings(how, weight_OI.dtype)
    of_layer = {"input_features": layer.in_features, "output_features": layer.out_features, "bias": False}
    made: Any
    if how is Quantize.int8:
        made = bnb.nn.Linear8bitLt(**of_layer, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
        made.weight = bnb.nn.Int8Params(weight_OI, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        four = {
            "quant_type": settings["bnb_4bit_quant_type"],
            "compress_statistics": settings["bnb_4bit_use_double_quant"],
        }
        made = bnb.nn.Linear4bit(**of_layer, **four, compute_dtype=weight_OI.dtype, device="meta")
        made.weight = bnb.nn.Params4bit(weight_OI, requires_grad=False, module=made, **four).to(device)
    if layer.bias is not None:
        made.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=weight_OI.dtype, device=device), False)
    found: nn.Module = made.eval()
    return found
