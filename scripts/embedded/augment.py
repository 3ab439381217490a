"""Picture augmentation on the device. B pictures, P pixels; values 0…1. Nothing here changes a hue."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def to_float(images_B3PP: Tensor) -> Tensor:
    return images_B3PP.float() / 255.0


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """[count, 1, 1, 1] uniform numbers, one a picture."""
    return low + (high - low) * torch.rand(count, 1, 1, 1, device=generator.device, generator=generator)


def reframe(images_B3PP: Tensor, generator: torch.Generator, *, zoom: float, shift: float) -> Tensor:
    """Zoom by up to the factor `zoom` either way and shift by up to `shift` of the width; edges are mirrored."""
    count = len(images_B3PP)
    scale = torch.exp(uniform(count, -math.log(zoom), math.log(zoom), generator)).view(count)
    moved = shift * (2 * torch.rand(count, 2, device=generator.device, generator=generator) - 1)
    affine = torch.zeros(count, 2, 3, device=generator.device)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = 2 * moved
    grid = functional.affine_grid(affine, list(images_B3PP.shape), align_corners=False)
    return functional.grid_sample(images_B3PP, grid, padding_mode="reflection", align_corners=False)


def blur(images_B3PP: Tensor, generator: torch.Generator, *, most: float) -> Tensor:
    """Mix each picture with a Gaussian blur of `most` pixels' deviation, by a share of its own."""
    share = uniform(len(images_B3PP), 0.0, 1.0, generator) ** 2
    return torch.lerp(images_B3PP, gaussian(images_B3PP, most), share)


def gaussian(images_BCPP: Tensor, deviation_px: float) -> Tensor:
    radius = max(1, round(2.5 * deviation_px))
    offsets = torch.arange(-radius, radius + 1, device=images_BCPP.device, dtype=images_BCPP.dtype)
    kernel = torch.exp(-0.5 * (offsets / deviation_px) ** 2)
    kernel = (kernel / kernel.sum()).expand(images_BCPP.shape[1], 1, 1, -1)
    padded = functional.pad(images_BCPP, (radius,) * 4, mode="replicate")
    rows = functional.conv2d(padded, kernel, groups=kernel.shape[0])
    return functional.conv2d(rows, kernel.transpose(2, 3), groups=kernel.shape[0])


def expose(images_B3PP: Tensor, generator: torch.Generator, *, most: float) -> Tensor:
    """Brightness, contrast and gamma, alike for the three channels."""
    count = len(images_B3PP)
    gain = 1.0 + uniform(count, -most, most, generator)
    offset = uniform(count, -most, most, generator) / 2
    gamma = torch.exp(uniform(count, -most, most, generator))
    return ((images_B3PP - 0.5) * gain + 0.5 + offset).clamp(1e-4, 1.0) ** gamma


def scratch(images_B3PP: Tensor, generator: torch.Generator, *, most: int) -> Tensor:
    """Draw up to `most` straight black or white lines across each picture, more or less opaque."""
    count, _, height, width = images_B3PP.shape

    def random(low: float, high: float) -> Tensor:  # [B, lines, 1, 1]
        return uniform(count * most, low, high, generator).view(count, most, 1, 1)

    y, x = (torch.arange(px, device=images_B3PP.device) / px - 0.5 for px in (height, width))
    turned = random(0.0, math.pi)
    from_line = (x * turned.cos() + y[:, None] * turned.sin() - random(-0.6, 0.6)).abs() * width
    opacity = (random(0.3, 1.8) + 0.5 - from_line).clamp(0.0, 1.0) * random(-1.0, 1.0).clamp_min(0.0)
    white = (random(0.0, 1.0) > 0.7).float()
    for line in range(most):
        images_B3PP = torch.lerp(images_B3PP, white[:, line, None], opacity[:, line, None])
    return images_B3PP


def add_noise(images_B3PP: Tensor, generator: torch.Generator, *, most: float) -> Tensor:
    noise = torch.randn(images_B3PP.shape, device=generator.device, generator=generator)
    return images_B3PP + uniform(len(images_B3PP), 0.0, most, generator) * noise


def jpeg_like(images_B3PP: Tensor, generator: torch.Generator, *, most: float) -> Tensor:
    """Round the 8×8 cosine coefficients of each channel, higher frequencies harder, as JPEG does."""
    count, channels, height, width = images_B3PP.shape
    basis_88 = cosine_basis(images_B3PP.device)
    blocks = images_B3PP.view(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    spectrum = basis_88 @ blocks @ basis_88.T
    order = torch.arange(8, device=images_B3PP.device)
    hardness_88 = 0.3 + (order[:, None] + order) / 7
    quantum = uniform(count, 1e-3, most, generator)[..., None, None] * hardness_88
    coarse = basis_88.T @ (torch.round(spectrum / quantum) * quantum) @ basis_88
    return coarse.transpose(3, 4).reshape(images_B3PP.shape)


def cosine_basis(device: torch.device) -> Tensor:
    """The orthonormal 8-point DCT-II."""
    order = torch.arange(8, device=device, dtype=torch.float32)
    basis_88 = torch.cos(math.pi * (order[None, :] + 0.5) * order[:, None] / 8) * 0.5
    basis_88[0] /= math.sqrt(2)
    return basis_88


def spoil(images_B3PP: Tensor, generator: torch.Generator, *, zoom: float, shift: float) -> Tensor:
    """All of the above, as a scanner, a camera, a codec or a careless resize would leave a picture."""
    images = scratch(reframe(images_B3PP, generator, zoom=zoom, shift=shift), generator, most=12)
    images = expose(blur(images, generator, most=1.6), generator, most=0.15)
    images = jpeg_like(images, generator, most=0.25)
    return add_noise(images, generator, most=0.05).clamp(0.0, 1.0)
