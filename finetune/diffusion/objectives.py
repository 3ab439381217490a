"""What an image model learns to predict: the noise levels it is trained at, their inputs, targets and weights.

B images, C latent channels, h×w latent pixels. Timesteps run from 0 (clean) to 1000 (noise) as released models count
them: whole numbers of a table of noise levels, or any number in between for flow matching.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune.config.rules import require_all
from finetune.config.schema import LossConfig, Weighting

FLOW_STEPS = 1000.0  # the timestep of pure noise, as every released flow model counts
IMAGE_PATCH = 2  # latent pixels on a side of what counts as one token where a schedule depends on the size


class Objective(Protocol):
    """One way to make training inputs and targets of clean latents and noise."""

    prediction_type: str
    """What the model predicts, a key of `ERRORS`."""

    def draw(self, random: torch.Generator, clean_Chw: Tensor) -> float:
        """The timestep of one training input."""
        ...

    def level(self, share: float) -> float:
        """The timestep at that share of the schedule, 0 … 1 (1 excluded)."""
        ...

    def noisy(self, clean_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        """The model's inputs."""
        ...

    def target(self, clean_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        """What the model should predict."""
        ...

    def snr(self, timesteps_B: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha² / sigma² of the model's inputs, (B,)."""
        ...


class Denoising:
    """Noise, velocity or clean latents at the noise levels of a scheduler (arXiv 2006.11239, 2202.00512).

    Inputs keep their variance, as backbones see them in sampling too; schedulers such as Euler's count otherwise, and
    scale what they hand to the backbone.
    """

    def __init__(self, scheduler: Any) -> None:
        self.prediction_type: str = scheduler.config.prediction_type
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod
        self.levels = len(self.alphas_cumprod)

    def draw(self, random: torch.Generator, clean_Chw: Tensor) -> int:
        return int(torch.randint(self.levels, (), generator=random))

    def level(self, share: float) -> int:
        return int(share * self.levels)

    def noisy(self, clean_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        alpha_B111, sigma_B111 = self._shares(timesteps_B, clean_BChw)
        return alpha_B111 * clean_BChw + sigma_B111 * noise_BChw

    def target(self, clean_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        if self.prediction_type == "v_prediction":
            alpha_B111, sigma_B111 = self._shares(timesteps_B, clean_BChw)
            return alpha_B111 * noise_BChw - sigma_B111 * clean_BChw
        return clean_BChw if self.prediction_type == "sample" else noise_BChw

    def snr(self, timesteps_B: Tensor) -> Tensor:
        alphas_B = self._table(timesteps_B)[timesteps_B].float()
        return alphas_B / (1 - alphas_B)

    def _table(self, like: Tensor) -> Tensor:
        """The noise levels where `like` is; they stay there, for a copy in each step would wait for the host."""
        if self.alphas_cumprod.device != like.device:
            self.alphas_cumprod = self.alphas_cumprod.to(like.device)
        return self.alphas_cumprod

    def _shares(self, timesteps_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the clean latents and of the noise is in an input, (B, 1, 1, 1) each."""
        kept_B = self._table(like).to(like.dtype)[timesteps_B].view(-1, *[1] * (like.ndim - 1))
        return kept_B**0.5, (1 - kept_B) ** 0.5


class Flow:
    """The velocity from clean latents to noise on a straight line (rectified flow, arXiv 2209.03003, 2403.03206).

    Timesteps are drawn logit-normally (arXiv 2403.03206, §3.1) and shifted as the base's scheduler shifts them, which
    for some bases depends on the image's size.
    """

    prediction_type = "flow"

    def __init__(self, scheduler: Any, patch: int = IMAGE_PATCH) -> None:
        self.config, self.patch = scheduler.config, patch

    def draw(self, random: torch.Generator, clean_Chw: Tensor) -> float:
        drawn = float(torch.sigmoid(torch.randn((), generator=random, dtype=torch.float64)))
        return FLOW_STEPS * shifted(drawn, self.shift(clean_Chw))

    def level(self, share: float) -> float:
        return FLOW_STEPS * share

    def noisy(self, clean_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        sigma_B111 = (timesteps_B / FLOW_STEPS).view(-1, *[1] * (clean_BChw.ndim - 1)).to(clean_BChw)
        return (1 - sigma_B111) * clean_BChw + sigma_B111 * noise_BChw

    def target(self, clean_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        return noise_BChw - clean_BChw

    def snr(self, timesteps_B: Tensor) -> Tensor:
        sigma_B = timesteps_B.float() / FLOW_STEPS
        return ((1 - sigma_B) / sigma_B).square()

    def shift(self, clean_Chw: Tensor) -> float:
        """How far an image's noise levels move towards noise, as `shifted` does it.

        A constant (Stable Diffusion 3), or more for more image tokens (FLUX's timestep shift): then its logarithm is a
        line between the two lengths that the scheduler's configuration names.
        """
        config = self.config
        if not config.get("use_dynamic_shifting"):
            return float(config.shift)
        tokens = clean_Chw.shape[-2] * clean_Chw.shape[-1] / self.patch**2
        low, high = config.base_image_seq_len, config.max_image_seq_len
        slope = (config.max_shift - config.base_shift) / (high - low)
        mu = config.base_shift + (tokens - low) * slope
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def of_scheduler(scheduler: Any) -> Objective:
    """The objective of a base with that scheduler; those of flow matching have no table of noise levels."""
    return Denoising(scheduler) if hasattr(scheduler, "alphas_cumprod") else Flow(scheduler)


def shifted(share: float, shift: float) -> float:
    """A noise level 0 … 1 moved towards noise for `shift` > 1 (arXiv 2403.03206, eq. 23)."""
    return shift * share / (1 + (shift - 1) * share)


ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "sample": torch.ones_like,
    "epsilon": lambda snr_B: snr_B,
    "v_prediction": lambda snr_B: snr_B + 1,
    "flow": lambda snr_B: (snr_B.sqrt() + 1).square(),
}
"""What is predicted -> (signal-to-noise ratios (B,)): its squared error over that of the clean latents behind it."""


def of_prediction(clean_weights_B: Tensor, snr_B: Tensor, prediction_type: str) -> Tensor:
    """Weights of squared errors in the prediction, (B,), from those of the errors in the clean latents behind it."""
    return clean_weights_B / ERRORS[prediction_type](snr_B).clamp(min=1e-8)  # zero-terminal SNR


def min_snr(objective: Objective, timesteps_B: Tensor, loss: LossConfig) -> Tensor:
    """min(SNR, γ) times the error in the clean latents (arXiv 2303.09556, eq. 4 and §3.4).

    Flow models count all levels alike: how often a level is drawn is its weight.
    """
    if not loss.min_snr_gamma or objective.prediction_type == Flow.prediction_type:
        return uniform(objective, timesteps_B, loss)
    snr_B = objective.snr(timesteps_B)
    return of_prediction(snr_B.clamp(max=loss.min_snr_gamma), snr_B, objective.prediction_type)


def uniform(objective: Objective, timesteps_B: Tensor, loss: LossConfig) -> Tensor:
    """All noise levels alike."""
    return torch.ones_like(timesteps_B, dtype=torch.float32)


WEIGHTINGS: dict[Weighting, Callable[[Objective, Tensor, LossConfig], Tensor]] = {
    Weighting.uniform: uniform,
    Weighting.min_snr: min_snr,
}
"""(objective, timesteps (B,), settings): weights of the squared errors of the predictions, (B,)."""
require_all(Weighting, WEIGHTINGS, "diffusion.objectives.WEIGHTINGS")
