"""The ways in which a training step can be computed; the probe measures them, the training takes the fastest."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.embedded.settings import Settings


@dataclass(frozen=True)
class Variant:
    channels_last: bool = True
    """Convolutions' own order on tensor cores; but PyTorch's group norm turns it back and forth."""
    bf16: bool = True
    """The model computes on bf16 weights with fp32 masters; otherwise autocast, which casts anew at every use."""
    compiled: bool = False
    """torch.compile of model and loss: fuses norms, activations and casts, for a minute or so of compiling."""

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """From a line like 'channels_last+bf16+compiled'; what it does not name is off."""
        words = set(text.split("+"))
        known = {"channels_last", "contiguous", "bf16", "autocast", "compiled", "eager"}
        if words - known:
            raise ValueError(f"a variant is made of {', '.join(sorted(known))} joined by '+', got '{text}'")
        return cls("channels_last" in words, "bf16" in words, "compiled" in words)

    def __str__(self) -> str:
        order = "channels_last" if self.channels_last else "contiguous"
        return f"{order}+{'bf16' if self.bf16 else 'autocast'}+{'compiled' if self.compiled else 'eager'}"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that the model computes with."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def compile(self, loss_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(loss_of, dynamic=False) if self.compiled else loss_of


PLAIN = Variant(channels_last=False, bf16=False)
"""For models that the probe does not know."""


def chosen_variant(settings: Settings, phase: str) -> Variant:
    """The one asked for, else the fastest that the probe measured for this phase, else the default, a guess."""
    if settings.variant is not None:
        return Variant.parse(settings.variant)
    path = settings.probed / f"{phase}.json"
    if path.exists():
        milliseconds: dict[str, float] = json.loads(path.read_text())
        return Variant.parse(min(milliseconds, key=lambda name: milliseconds[name]))
    return Variant()
