"""What a frozen base with adapters can still do for memory, one measure after the other."""

from collections.abc import Iterator

import torch
from torch import nn

from finetune.config.schema import ModelConfig, Quantize
from finetune.memory import block_offload, checkpointing
from finetune.memory.activation_offload import ActivationOffload


def gpu_fallbacks(
    model: nn.Module,
    settings: ModelConfig,
    checkpointed: int,
    activation_offload: ActivationOffload,
    device: torch.device,
) -> Iterator[str]:
    """Take the next measure at each `next`, and name the setting that would have been the same from the start.

    recomputed: `trainer.activation_checkpointing` as it is.
    """
    streamed = checkpointing.has_self_checkpointing(model)  # in CPU memory, so every block is recomputed already
    if not streamed and checkpointed != 1 and checkpointing.checkpointable(model):
        checkpointing.set_checkpointing(model, 1)
        yield "trainer.activation_checkpointing=1"
    if device.type != "cuda":
        return
    if not activation_offload.enabled:
        activation_offload.enabled = True
        yield "trainer.offload_activations=true"
    if streamed or settings.quantize is Quantize.int8:
        return
    if blocks := block_offload.find(model):
        block_offload.stream(model, blocks, device)
        yield "model.offload=true"
