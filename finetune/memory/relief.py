"""What a frozen base with adapters can still do for memory, one measure after the other."""

from collections.abc import Iterator

import torch
from torch import nn

from finetune.config.schema import ModelConfig, Quantize
from finetune.memory import block_offload, checkpointing
from finetune.memory.activation_offload import Kept


def measures(
    model: nn.Module, settings: ModelConfig, recomputed: int, kept: Kept, device: torch.device
) -> Iterator[str]:
    """Take the next measure at each `next`, and name the setting that would have been the same from the start.

    recomputed: `trainer.checkpointing` as it is.
    """
    streamed = checkpointing.by_itself(model)  # in main memory, so every block is recomputed already
    if not streamed and recomputed != 1 and checkpointing.guards(model):
        checkpointing.recompute(model, 1)
        yield "trainer.checkpointing=1"
    if device.type != "cuda":
        return
    if not kept.away:
        kept.away = True
        yield "trainer.offload_activations=true"
    if streamed or settings.quantize is Quantize.int8:
        return
    if blocks := block_offload.find(model):
        block_offload.stream(model, blocks, device)
        yield "model.offload=true"
