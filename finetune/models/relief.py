"""What a frozen base with adapters can still do for memory, one measure after the other."""

from collections.abc import Iterator

from torch import nn

from finetune.models import checkpointing


def measures(model: nn.Module, *, recomputed: int) -> Iterator[str]:
    """Take the next measure at each `next`, and name the setting that would have been the same from the start.

    recomputed: `trainer.checkpointing` as it is.
    """
    if recomputed != 1 and checkpointing.possible(model):
        checkpointing.recompute(model, 1)
        yield "trainer.checkpointing=1"
