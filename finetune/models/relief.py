"""What a frozen base with adapters can still do for memory, one measure after the other."""

from collections.abc import Iterator

import torch
from torch import nn

from finetune.config import ModelConfig, Quantize
from finetune.models import checkpointing, offload


def measures(model: nn.Module, settings: ModelConfig, recomputed: int, device: torch.device) -> Iterator[str]:
    """Take the next measure at each `next`, and name the setting that would have been the same from the start.

    recomputed: `trainer.checkpointing` as it is.
    """
    if checkpointing.by_itself(model):  # in main memory, so every block is recomputed already
        return
    if recomputed != 1 and checkpointing.guards(model):
        checkpointing.recompute(model, 1)
        yield "trainer.checkpointing=1"
    if device.type != "cuda" or settings.quantize is Quantize.int8:
        return
    if blocks := offload.find(model):
        offload.stream(model, blocks, device)
        yield "model.offload=true"
