"""Whether images can be drawn on a GPU by what serves them, before anything is loaded.

As for a training, the model's own code runs on tensors that have nothing in them; see `planning.tracer`.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from finetune.config.schema import CaptionConfig, LoraConfig, LossConfig, ModelConfig, Quantize, SampleConfig
from finetune.diffusion import meta
from finetune.diffusion.memory_model import DiffusionMemoryModel
from finetune.errors import ConfigError, ModelError
from finetune.memory import block_offload
from finetune.planning.candidates import parts
from finetune.planning.machine import GIB, Machine
from finetune.run.progress import say


def encoders_fit(
    model: ModelConfig, sample: SampleConfig, dtype: torch.dtype, machine: Machine, adapter_bytes: float
) -> bool:
    """Whether the text encoders find room on the GPU beside the rest; if not they work in CPU memory, and that is said.

    adapter_bytes: of all that are loaded at once. Raises ConfigError where one image of the recipe's resolution doesn't
    fit without the encoders either. A base that can't be planned gets the GPU for all, and that is said.
    """
    try:
        encoders_gib = block_offload.weight_bytes(meta.text_encoders(model)) / GIB
        for drawing_gib in _drawing_gib(model, sample, dtype, machine, adapter_bytes):
            if drawing_gib + encoders_gib <= machine.vram_gib:
                return True
    except ModelError as error:  # one that can't be had at all is named again when it is loaded
        say(f"serve: {error}")
        return True
    side, where = model.resolution, f"{machine.name} has {machine.vram_gib:.1f} GiB"
    if drawing_gib > machine.vram_gib:
        need = f"an image of {side}×{side} takes {drawing_gib:.1f} GiB"
        raise ConfigError(f"{need}, and {where}; try {_smaller(model)}")
    say(
        f"serve: the text encoders ({encoders_gib:.1f} GiB) work in CPU memory, which is slower: images take "
        f"{drawing_gib:.1f} GiB beside them, and {where}"
    )
    return False


def _smaller(model: ModelConfig) -> str:
    if model.quantize is not Quantize.nf4:
        return "model.quantize=nf4"
    return "a smaller model.resolution" if model.offload else "model.offload=true"


def _drawing_gib(
    model: ModelConfig, sample: SampleConfig, dtype: torch.dtype, machine: Machine, adapter_bytes: float
) -> Iterator[float]:
    """Of one image, and of one that is decoded in tiles."""
    drawn = DiffusionMemoryModel(
        dtype,
        cuda=machine.cuda,
        room=(machine.vram_gib - machine.context_gib) * GIB,
        model=model,
        lora=LoraConfig(rank=1),  # adapters are counted by their files
        loss=LossConfig(),
        caption=CaptionConfig(),
        sample=replace(sample, prompts=["one image"], seeds=[0], previews=1),
        max_aspect=1.0,
        validations=0,
        previews=0,
        examples=None,
        seed=0,
        fast=False,
    )
    ((_, options),) = drawn.training_phases(1, drawn.offloaded() | {"loaded adapters": adapter_bytes})
    for option in options:
        if option.trace is not None:
            yield sum(parts(option.trace, machine).values())
