"""Abstract pictures for the autoencoder, made on the device: gradients, shaded balls, uneven light, gloss.

They make it a general codec that can also decode shaded pictures, without its ever seeing a render but flat ones.
B pictures, P pixels; values 0…1.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from scripts.embedded.augment import blur, expose, uniform

BALLS = 5


def smooth_field(count: int, channels: int, px: int, generator: torch.Generator) -> Tensor:
    """[count, channels, px, px] of smooth variation over 0…1: one to four random cells across, interpolated.

    The number of cells is a zoom of each picture's own: a number drawn for all would have to reach the CPU, which would
    wait for the GPU at every step.
    """
    device = generator.device
    coarse = torch.rand(count, channels, 5, 5, device=device, generator=generator)
    zoom = uniform(count, 0.25, 1.0, generator).view(count)
    moved = (2 * torch.rand(count, 2, device=device, generator=generator) - 1) * (1 - zoom[:, None])
    affine = torch.zeros(count, 2, 3, device=device)
    affine[:, 0, 0] = affine[:, 1, 1] = zoom
    affine[:, :, 2] = moved
    grid = functional.affine_grid(affine, [count, channels, px, px], align_corners=True)
    fields = functional.grid_sample(coarse, grid, mode="bicubic", padding_mode="border", align_corners=True)
    return fields.clamp(0.0, 1.0)


def positions(px: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coordinates -1…1 of the pixel centres, as [px] rows that broadcast: x over columns, y over rows."""
    line = (torch.arange(px, device=device) + 0.5) / px * 2 - 1
    return line, line[:, None]


def shaded_balls(backdrop_B3PP: Tensor, generator: torch.Generator) -> Tensor:
    """Draw lit ellipsoids with soft edges, shadows, rims and highlights over a backdrop."""
    images = backdrop_B3PP
    count, px = len(images), images.shape[-1]
    x, y = positions(px, images.device)
    for _ in range(BALLS):
        centre_x, centre_y = (uniform(count, -0.9, 0.9, generator) for _ in range(2))
        radius = uniform(count, 0.05, 0.6, generator)
        stretch = uniform(count, 0.6, 1.6, generator)
        across, down = (x - centre_x) / radius * stretch, (y - centre_y) / radius
        distance = (across**2 + down**2).sqrt()
        # An edge one to several pixels wide: crisp in most, out of focus in some.
        softness = uniform(count, 0.0, 1.0, generator) ** 3 * 0.3 + 2.0 / (px * radius)
        cover = ((1.0 - distance) / softness + 0.5).clamp(0.0, 1.0)
        shadow = torch.exp(-((across - 0.2) ** 2) - ((down - 1.0) * 3) ** 2)
        images = images * (1.0 - uniform(count, 0.0, 0.6, generator) * shadow)

        depth = (1.0 - distance**2).clamp_min(0.0).sqrt()
        # From the right, from above, and mostly from the front.
        right, above, front = torch.randn(3, count, 1, 1, 1, device=images.device, generator=generator).abs()
        light = functional.normalize(torch.cat([right, -above, 1.5 * front], dim=1), dim=1)
        facing = across * light[:, :1] + down * light[:, 1:2] + depth * light[:, 2:]
        colour = torch.rand(count, 3, 1, 1, device=images.device, generator=generator)
        ambient = uniform(count, 0.2, 0.7, generator)
        shaded = colour * (ambient + (1.0 - ambient) * facing.clamp(0.0, 1.0))
        rim = uniform(count, 0.0, 0.5, generator) * (1.0 - depth) ** 3
        gloss = uniform(count, 0.0, 1.0, generator) * facing.clamp(0.0, 1.0) ** 24
        images = torch.lerp(images, (shaded + rim + gloss).clamp(0.0, 1.0), cover)
    return images


def relight(images_B3PP: Tensor, generator: torch.Generator) -> Tensor:
    """Multiply by a smooth, faintly coloured light and add a few glossy spots."""
    count, px = len(images_B3PP), images_B3PP.shape[-1]
    light = 0.35 + 1.0 * smooth_field(count, 1, px, generator)
    tint = 0.85 + 0.3 * smooth_field(count, 3, px, generator)
    images = images_B3PP * light * tint
    x, y = positions(px, images.device)
    for _ in range(3):
        across = x - uniform(count, -1, 1, generator)
        down = y - uniform(count, -1, 1, generator)
        width = uniform(count, 0.02, 0.2, generator)
        images = images + uniform(count, 0.0, 0.8, generator) * torch.exp(-(across**2 + down**2) / width**2)
    return images.clamp(0.0, 1.0)


def recolour(images_B3PP: Tensor, generator: torch.Generator) -> Tensor:
    """Mix the channels at random: the codec must hold every hue, also those no flat render has."""
    noise = torch.randn(len(images_B3PP), 3, 3, device=images_B3PP.device, generator=generator)
    mixing = torch.eye(3, device=images_B3PP.device) + 0.25 * noise
    return torch.einsum("bij,bjhw->bihw", mixing, images_B3PP).clamp(0.0, 1.0)


def autoencoder_batch(flat_B3PP: Tensor, generator: torch.Generator) -> Tensor:
    """A training batch from flat renders: half stay plain, the rest turn into abstract and shaded pictures.

    The sixths of the other half: gradients, balls on gradients, lit balls on renders, blurred and lit, blurred and
    recoloured, recoloured renders. What two sixths share is one slice, since each change is some hundred GPU kernels.
    """
    plain, rest = flat_B3PP[: len(flat_B3PP) // 2], flat_B3PP[len(flat_B3PP) // 2 :].clone()

    def change(first: int, stop: int, how: Callable[[Tensor], Tensor]) -> None:
        """From one sixth to before another; in a small batch there may be none."""
        part = rest[first * len(rest) // 6 : stop * len(rest) // 6]
        if len(part):
            part.copy_(how(part))

    change(0, 2, lambda images: smooth_field(len(images), 3, images.shape[-1], generator))
    change(1, 3, lambda images: shaded_balls(images, generator))
    change(3, 5, lambda images: blur(images, generator, most=3.0))
    change(2, 4, lambda images: relight(images, generator))
    change(4, 6, lambda images: recolour(images, generator))
    return torch.cat([plain, expose(rest, generator, most=0.25)])
