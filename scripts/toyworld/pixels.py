"""Small picture operations the styles share. Pictures here are [B, S, S] or [B, S, S, C], colours in 0..1."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, max_pool2d, pad


def linear(srgb: Tensor) -> Tensor:
    """sRGB to light (the 2.2 power is close enough to the standard's curve for painting)."""
    return srgb.clamp_min(0) ** 2.2


def srgb(light: Tensor) -> Tensor:
    """Light to sRGB."""
    return light.clamp_min(0) ** (1 / 2.2)


def average_down(picture_BSSC: Tensor, size: int) -> Tensor:
    """Size x size pixels, means of those that they cover."""
    side = picture_BSSC.shape[1]
    if side == size:
        return picture_BSSC
    planes = picture_BSSC.permute(0, 3, 1, 2)
    if side % size == 0:
        return avg_pool2d(planes, side // size).permute(0, 2, 3, 1)
    return interpolate(planes, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def grow(values_BSS: Tensor, radius: int) -> Tensor:
    """The largest value within a square of this radius."""
    return max_pool2d(values_BSS[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]


def blurred(picture_BSSC: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of `sigma` pixels, the border repeated."""
    radius = max(1, int(2.5 * sigma + 0.5))
    steps = torch.arange(-radius, radius + 1, device=picture_BSSC.device, dtype=picture_BSSC.dtype)
    kernel = torch.exp(-0.5 * (steps / max(sigma, 1e-3)) ** 2)
    kernel = kernel / kernel.sum()
    channels = picture_BSSC.shape[-1]
    planes = picture_BSSC.permute(0, 3, 1, 2)
    across = kernel.expand(channels, 1, 1, -1)
    planes = conv2d(pad(planes, (radius, radius, 0, 0), mode="replicate"), across, groups=channels)
    planes = conv2d(pad(planes, (0, 0, radius, radius), mode="replicate"), across.transpose(2, 3), groups=channels)
    return planes.permute(0, 2, 3, 1)


def mixed(a: Tensor, b: Tensor, amount_BSS: Tensor) -> Tensor:
    """a where `amount` is 0, b where it is 1."""
    return a + (b - a) * amount_BSS[..., None]
