"""Inputs, targets and weights are those of the papers and of the libraries' own schedulers."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from finetune.config.schema import LossConfig, Weighting
from finetune.diffusion.objectives import (
    FLOW_STEPS,
    WEIGHTINGS,
    Denoising,
    Flow,
    Objective,
    of_prediction,
    shifted,
)

CLEAN, NOISE = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)


def levels(prediction_type: str, *ratios: float) -> Denoising:
    """Noise levels of those signal-to-noise ratios, one a timestep."""
    snr = torch.tensor(ratios, dtype=torch.float64)
    config = SimpleNamespace(prediction_type=prediction_type)
    return Denoising(SimpleNamespace(config=config, alphas_cumprod=snr / (1 + snr)))


def weights(objective: Objective, timesteps: list[float], weighting: Weighting, gamma: float = 5.0) -> torch.Tensor:
    loss = LossConfig(weighting=weighting, min_snr_gamma=gamma)
    return WEIGHTINGS[weighting](objective, torch.tensor(timesteps), loss)


@pytest.mark.parametrize(("gamma", "ratio"), [(5.0, 0.5), (5.0, 20.0), (1.0, 3.0)])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_equal_the_clipped_error_in_x0(kind: str, gamma: float, ratio: float) -> None:
    """For the same prediction, weight x error must be min(SNR, gamma) x error in x0, whatever is predicted."""
    alpha, sigma, wrong = math.sqrt(ratio / (1 + ratio)), math.sqrt(1 / (1 + ratio)), 0.37  # the last: the error in x0
    # v = alpha·noise - sigma·x0, with the noise implied by x0
    error = {"sample": wrong, "epsilon": alpha / sigma * wrong, "v_prediction": wrong / sigma}[kind]
    (weight,) = weights(levels(kind, ratio), [0], Weighting.min_snr, gamma)
    assert float(weight) * error**2 == pytest.approx(min(ratio, gamma) * wrong**2)


def test_an_error_in_a_flows_velocity_is_one_in_its_clean_latents_over_sigma() -> None:
    objective, timesteps = Flow(FlowMatchEulerDiscreteScheduler()), torch.tensor([100.0, 800.0])
    snr = objective.snr(timesteps)
    assert snr == pytest.approx(torch.tensor([9.0**2, 0.25**2]))
    found = of_prediction(torch.ones(2), snr, objective.prediction_type)
    assert found == pytest.approx((timesteps / FLOW_STEPS).square())  # velocity = (noisy - clean) / sigma


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_zero_terminal_snr_stays_finite(kind: str) -> None:
    assert torch.isfinite(weights(levels(kind, 99.0, 0.0), [0, 1], Weighting.min_snr)).all()


def test_where_levels_are_weighted_alike() -> None:
    denoising, flow = levels("epsilon", 0.5, 20.0), Flow(FlowMatchEulerDiscreteScheduler())
    assert weights(denoising, [0, 1], Weighting.uniform).tolist() == [1.0, 1.0]
    assert weights(denoising, [0, 1], Weighting.min_snr, gamma=0.0).tolist() == [1.0, 1.0]
    assert weights(flow, [10.0, 990.0], Weighting.min_snr).tolist() == [1.0, 1.0]
    assert weights(denoising, [0, 1], Weighting.min_snr).tolist() != [1.0, 1.0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_one_step_of_the_sampler_with_the_target_gives_the_clean_latents(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False, set_alpha_to_one=True)
    objective = Denoising(scheduler)
    timesteps = torch.tensor([500, 500])
    noisy, target = objective.noisy(CLEAN, NOISE, timesteps), objective.target(CLEAN, NOISE, timesteps)
    scheduler.set_timesteps(2)
    assert torch.allclose(scheduler.step(target, 500, noisy).pred_original_sample, CLEAN, atol=1e-4)


@pytest.mark.parametrize("schedule", [DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler], ids=lambda s: s.__name__)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_inputs_and_targets_are_the_same_whatever_scheduler_samples(schedule: Any, kind: str) -> None:
    """Euler's adds noise without taking any of the image away, and scales the sum only when it samples."""
    settings: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    reference = DDPMScheduler(**settings, prediction_type=kind)
    objective = Denoising(schedule(**settings, prediction_type=kind))
    timesteps = torch.tensor([3, 900])
    assert torch.allclose(objective.noisy(CLEAN, NOISE, timesteps), reference.add_noise(CLEAN, NOISE, timesteps))
    expected = NOISE if kind == "epsilon" else reference.get_velocity(CLEAN, NOISE, timesteps)
    assert torch.allclose(objective.target(CLEAN, NOISE, timesteps), expected)


def test_a_flow_sampler_with_the_target_as_prediction_walks_from_noise_to_clean_latents() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = Flow(scheduler)
    scheduler.set_timesteps(7)
    walking = NOISE
    for timestep in scheduler.timesteps:
        assert torch.allclose(walking, objective.noisy(CLEAN, NOISE, timestep.expand(2)), atol=1e-4)
        walking = scheduler.step(objective.target(CLEAN, NOISE, timestep.expand(2)), timestep, walking).prev_sample
    assert torch.allclose(walking, CLEAN, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_fixed_shift_is_the_schedulers(shift: float) -> None:
    """The scheduler applies it to evenly spaced levels; so does `shifted`."""
    sigmas = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
    even = FlowMatchEulerDiscreteScheduler(shift=1.0).sigmas
    assert torch.tensor([shifted(float(share), shift) for share in even[:10]]) == pytest.approx(sigmas[:10], abs=1e-5)


@pytest.mark.parametrize(("side", "kind"), [(32, "exponential"), (128, "exponential"), (64, "linear")])
def test_a_shift_by_size_is_the_schedulers(side: int, kind: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    slope = (1.15 - 0.5) / (4096 - 256)
    mu = 0.5 + (side * side / 4 - 256) * slope
    even = torch.tensor([0.9, 0.5, 0.1])
    expected = scheduler.time_shift(mu, 1.0, even)
    shift = Flow(scheduler).shift(torch.zeros(16, side, side))
    assert torch.tensor([shifted(float(share), shift) for share in even]) == pytest.approx(expected, abs=1e-5)


def test_flow_levels_are_drawn_logit_normally_and_moved_to_noise_by_the_shift() -> None:
    def median(shift: float) -> float:
        objective, random = Flow(FlowMatchEulerDiscreteScheduler(shift=shift)), torch.Generator().manual_seed(0)
        drawn = sorted(objective.draw(random, CLEAN[0]) for _ in range(2001))
        assert 0 < drawn[0] < drawn[-1] < FLOW_STEPS
        return drawn[1000]

    assert median(1.0) == pytest.approx(500, abs=25)
    assert median(3.0) == pytest.approx(750, abs=25)
    random = torch.Generator().manual_seed(0)
    levels = [Flow(FlowMatchEulerDiscreteScheduler()).draw(random, CLEAN[0]) / FLOW_STEPS for _ in range(4000)]
    logits = torch.tensor([math.log(level / (1 - level)) for level in levels])
    assert float(logits.std()) == pytest.approx(1.0, abs=0.05)
