"""An exponential moving average of the adapter's weights, kept beside the live ones."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """Averaged weights: average = decay * average + (1 - decay) * live, with a warm-up of the decay.

    The warm-up min(decay, (1 + n) / (10 + n)) keeps the random start out of short runs.
    """

    def __init__(self, decay: float, weights: Mapping[str, Tensor], updates: int = 0) -> None:
        self.decay, self.updates = decay, updates
        self.weights = {name: weight.clone() for name, weight in weights.items()}

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take one step's weights in."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, weight in weights.items():
            self.weights[name].lerp_(weight, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint stores."""
        weights = {name: weight.cpu() for name, weight in self.weights.items()}
        return {**weights, "updates": torch.tensor(self.updates)}

    @classmethod
    def restore(cls, decay: float, state: Mapping[str, Tensor], device: torch.device) -> "Ema":
        """The inverse of `state`."""
        weights = {name: weight.to(device) for name, weight in state.items() if name != "updates"}
        return cls(decay, weights, int(state["updates"]))
