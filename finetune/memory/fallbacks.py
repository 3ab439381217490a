"""What happens when memory runs out: it is noticed, cleaned up after, and the same work is done in another way.

In training steps `training.oom` halves micro-batches first and then takes the fallbacks of `gpu_fallbacks`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from finetune.config.schema import ModelConfig, Quantize
from finetune.errors import is_gpu_out_of_memory, is_out_of_memory
from finetune.memory import block_offload, checkpointing
from finetune.memory.activation_offload import ActivationOffload
from finetune.memory.device import release_memory
from finetune.run.progress import say

T = TypeVar("T")
U = TypeVar("U")


def try_within_memory(
    attempt: Callable[[], T],
    cleanup: Callable[[], Any] = lambda: None,
    is_oom: Callable[[Exception], bool] = is_out_of_memory,
) -> T | None:
    """What `attempt` returns, or None where memory ran out; then `cleanup` is called and all that is free given back.

    The exception is gone by the time of `cleanup`: its traceback holds the tensors of every frame it passed.
    """
    try:
        return attempt()
    except Exception as error:
        if not is_oom(error):
            raise
    cleanup()
    release_memory()
    return None


class AdaptiveBatch:
    """Works through items in batches that shrink when the GPU is too small; below one item it applies fallbacks.

    Both are for good.
    """

    def __init__(self, batch_size: int, *fallbacks: Callable[[], None], doing: str = "") -> None:
        """fallbacks: applied in turn. doing: the verb of the message that a batch shrinks; empty says nothing."""
        self.batch_size, self.fallbacks, self.doing = batch_size, list(fallbacks), doing

    def each(self, work: Callable[[Sequence[U]], list[T]], items: Sequence[U]) -> list[T]:
        """The results of `work` for all items. Raises torch.OutOfMemoryError if one is too much after all fallbacks."""
        found: list[T] = []
        while len(found) < len(items):
            part = items[len(found) : len(found) + self.batch_size]
            last = len(part) == 1 and not self.fallbacks
            done = work(part) if last else try_within_memory(partial(work, part), is_oom=is_gpu_out_of_memory)
            if done is not None:
                found += done
            elif len(part) > 1:
                self.batch_size = len(part) // 2
                if self.doing:
                    say(f"the GPU is too small for {len(part)} at once; {self.doing} {self.batch_size}")
            else:
                self.fallbacks.pop(0)()
        return found


def gpu_fallbacks(
    model: nn.Module,
    settings: ModelConfig,
    checkpointed: int,
    activation_offload: ActivationOffload,
    device: torch.device,
) -> Iterator[str]:
    """What a frozen base with adapters can still do for memory: each `next` does one thing, and names the setting that
    would have been the same from the start.

    checkpointed: `trainer.activation_checkpointing` as it is.
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
