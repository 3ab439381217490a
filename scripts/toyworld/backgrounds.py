"""The six settings as painted scenery: a backdrop above the horizon and a ground below it, batched over scenes.

Painters take u and h [B, N] (h = height over the horizon, in half pictures) or ground x and z, and `dice` [B, DICE]
in 0..1 that scatters the scenery; they return sRGB [B, N, 3]. One painter serves the flat picture as it is and the
film out of focus.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scripts.toyworld.crowd import Crowd
from scripts.toyworld.scene import Scene

DICE = 40
Rgb = tuple[float, float, float]


def scatter_dice(scenes: Sequence[Scene | Crowd], device: torch.device) -> Tensor:
    """[B, DICE] uniform numbers, from each scene's seed."""
    rows = []
    for scene in scenes:
        rng = random.Random(f"toyworld scenery {scene.seed}")
        rows.append([rng.random() for _ in range(DICE)])
    return torch.tensor(rows, device=device)


def paint_backdrop(settings: Sequence[str], u_BN: Tensor, h_BN: Tensor, dice: Tensor) -> Tensor:
    """What stands behind the ground, sRGB [B, N, 3]."""
    return _per_setting(settings, _BACKDROPS, u_BN, h_BN, dice)


def paint_ground(settings: Sequence[str], x_BN: Tensor, z_BN: Tensor, dice: Tensor) -> Tensor:
    """The ground seen at x, z (z grows towards the camera), sRGB [B, N, 3]."""
    return _per_setting(settings, _GROUNDS, x_BN, z_BN, dice)


Painter = Callable[[Tensor, Tensor, Tensor], Tensor]


def _per_setting(settings: Sequence[str], painters: dict[str, Painter], a: Tensor, b: Tensor, dice: Tensor) -> Tensor:
    out = torch.empty(*a.shape, 3, device=a.device)
    for setting, painter in painters.items():
        rows = [row for row, name in enumerate(settings) if name == setting]
        if rows:
            index = torch.tensor(rows, device=a.device)
            out[index] = painter(a[index], b[index], dice[index])
    return out


# Painting: each helper lays one shape over a picture and returns the picture.


def _wash(like: Tensor, low: Rgb, high: Rgb, mix: Tensor) -> Tensor:
    """A gradient from `low` to `high`."""
    a, b = like.new_tensor(low), like.new_tensor(high)
    return a + (b - a) * mix.clamp(0, 1)[..., None]


def _over(picture: Tensor, inside: Tensor, rgb: Rgb, strength: float = 1.0) -> Tensor:
    """Where the signed distance `inside` is below 0, `rgb`; the edge is left to the averaging of samples."""
    cover = (inside < 0).to(picture.dtype)[..., None] * strength
    return picture + (picture.new_tensor(rgb) - picture) * cover


def _disc(u: Tensor, h: Tensor, x: Tensor | float, y: Tensor | float, radius: Tensor | float) -> Tensor:
    return torch.sqrt((u - x) ** 2 + (h - y) ** 2) - radius


def _rect(
    u: Tensor, h: Tensor, x: Tensor | float, y: Tensor | float, half_x: Tensor | float, half_y: Tensor | float
) -> Tensor:
    return torch.maximum((u - x).abs() - half_x, (h - y).abs() - half_y)


def _die(dice: Tensor, k: int, low: float, high: float) -> Tensor:
    return low + (high - low) * dice[:, k % DICE, None]


def _cloud(picture: Tensor, u: Tensor, h: Tensor, x: Tensor, y: Tensor, size: Tensor, rgb: Rgb) -> Tensor:
    shape = _disc(u, h, x, y, size)
    for dx, dy, r in ((-1.1, -0.25, 0.7), (1.1, -0.2, 0.75), (0.45, 0.35, 0.7)):
        shape = torch.minimum(shape, _disc(u, h, x + dx * size, y + dy * size, r * size))
    return _over(picture, torch.maximum(shape, y - 0.6 * size - h), rgb)


def _meadow(u: Tensor, h: Tensor, dice: Tensor) -> Tensor:
    picture = _wash(u, (0.80, 0.93, 1.0), (0.52, 0.80, 0.98), h)
    picture = _over(picture, _disc(u, h, _die(dice, 0, -0.8, 0.8), _die(dice, 1, 0.8, 1.0), 0.15), (1.0, 0.93, 0.66))
    for k in range(3):
        x, y = _die(dice, 2 + 3 * k, -1.0, -0.3) + 0.65 * k, _die(dice, 3 + 3 * k, 0.5, 1.05)
        picture = _cloud(picture, u, h, x, y, _die(dice, 4 + 3 * k, 0.07, 0.11), (1.0, 1.0, 1.0))
    far = 0.24 + 0.1 * torch.sin(2.2 * u + _die(dice, 12, 0, 6.3))
    near = 0.1 + 0.08 * torch.sin(1.7 * u + _die(dice, 13, 0, 6.3))
    picture = _over(picture, h - far, (0.62, 0.82, 0.62))
    return _over(picture, h - near, (0.68, 0.86, 0.50))


def _meadow_ground(x: Tensor, z: Tensor, dice: Tensor) -> Tensor:
    picture = _wash(
        x, (0.72, 0.88, 0.50), (0.62, 0.82, 0.42), 0.35 + 0.35 * torch.sin(1.3 * x + 2.1 * z + _die(dice, 14, 0, 6))
    )
    # Daisies on a jittered grid: each cell of the ground holds at most one.
    cell_x, cell_z = torch.floor(x / 0.27), torch.floor(z / 0.27)
    noise = _hash(cell_x, cell_z, dice)
    dx, dz = x - (cell_x + 0.3 + 0.4 * noise) * 0.27, z - (cell_z + 0.3 + 0.4 * _hash(cell_z, cell_x, dice)) * 0.27
    far = torch.sqrt(dx**2 + (1.6 * dz) ** 2) + (noise < 0.55) * 1.0
    return _over(_over(picture, far - 0.034, (1.0, 1.0, 0.97)), far - 0.014, (0.98, 0.86, 0.45))


def _beach(u: Tensor, h: Tensor, dice: Tensor) -> Tensor:
    picture = _wash(u, (1.0, 0.92, 0.80), (0.60, 0.86, 0.97), (h - 0.25) * 1.6)
    picture = _over(picture, _disc(u, h, _die(dice, 0, -0.7, 0.7), _die(dice, 1, 0.75, 0.95), 0.17), (1.0, 0.96, 0.78))
    for k in range(2):
        x, y = _die(dice, 2 + 3 * k, -0.9, -0.1) + 0.9 * k, _die(dice, 3 + 3 * k, 0.6, 1.0)
        picture = _cloud(picture, u, h, x, y, _die(dice, 4 + 3 * k, 0.06, 0.09), (1.0, 1.0, 1.0))
    sea = 0.27 + _die(dice, 12, -0.03, 0.03)
    picture = _over(picture, h - sea, (0.26, 0.68, 0.76))
    crest = torch.sin(9 * u + _die(dice, 13, 0, 6)) * 0.012
    for level, bright in ((0.19, (0.42, 0.78, 0.83)), (0.10, (0.55, 0.85, 0.87))):
        picture = _over(picture, (h - level - crest).abs() - 0.014, bright)
    return _over(picture, h - 0.035 - 1.6 * crest, (0.97, 0.98, 0.96))


def _beach_ground(x: Tensor, z: Tensor, dice: Tensor) -> Tensor:
    ripple = torch.sin(7 * z + 1.4 * torch.sin(2 * x + _die(dice, 14, 0, 6)))
    picture = _wash(x, (0.97, 0.89, 0.72), (0.93, 0.83, 0.64), 0.5 + 0.5 * ripple)
    cell_x, cell_z = torch.floor(x / 0.45), torch.floor(z / 0.45)
    noise = _hash(cell_x, cell_z, dice)
    dx, dz = x - (cell_x + 0.2 + 0.6 * noise) * 0.45, z - (cell_z + 0.5) * 0.45
    return _over(picture, torch.sqrt(dx**2 + (1.8 * dz) ** 2) + (noise < 0.5) * 1.0 - 0.045, (1.0, 0.97, 0.90))


def _city(u: Tensor, h: Tensor, dice: Tensor) -> Tensor:
    picture = _wash(u, (0.98, 0.90, 0.86), (0.70, 0.80, 0.94), h * 0.9)
    for layer, (wide, rgb, window) in enumerate(
        (
            (0.30, (0.73, 0.76, 0.86), None),
            (0.40, (0.56, 0.60, 0.74), (0.95, 0.91, 0.78)),
        )
    ):
        shifted = u + _die(dice, layer, 0, 1.0)
        block = torch.floor(shifted / wide)
        top = (0.95, 0.72)[layer] - (0.5, 0.5)[layer] * _hash(block, block * 0 + layer, dice)
        inside = shifted - (block + 0.5) * wide
        picture = _over(picture, torch.maximum(h - top, inside.abs() - wide * 0.46), rgb)
        if window is not None:
            col, row = inside / 0.095, (top - h) / 0.13
            lit = torch.maximum(
                (col - torch.floor(col) - 0.5).abs() - 0.26, (row - torch.floor(row) - 0.55).abs() - 0.27
            )
            lit = torch.maximum(lit, torch.maximum(inside.abs() - 0.145, torch.maximum(0.05 - h, h - top + 0.03)))
            picture = _over(picture, lit, window)
    return picture


def _city_ground(x: Tensor, z: Tensor, dice: Tensor) -> Tensor:
    picture = _wash(x, (0.80, 0.80, 0.83), (0.80, 0.80, 0.83), z)
    seam = torch.minimum((x / 0.5 - torch.floor(x / 0.5) - 0.5).abs(), (z / 0.5 - torch.floor(z / 0.5) - 0.5).abs())
    picture = _over(picture, seam - 0.025, (0.71, 0.71, 0.75))
    picture = _over(picture, (z + 1.9).abs() - 0.75, (0.47, 0.48, 0.54))
    dash = torch.maximum((z + 1.9).abs() - 0.07, (x / 0.7 - torch.floor(x / 0.7) - 0.5).abs() - 0.27)
    picture = _over(picture, dash, (0.96, 0.94, 0.86))
    return _over(picture, (z + 1.1).abs() - 0.06, (0.88, 0.88, 0.90))


def _snow(u: Tensor, h: Tensor, dice: Tensor) -> Tensor:
    picture = _wash(u, (0.86, 0.92, 0.97), (0.66, 0.78, 0.90), h)
    far = 0.36 + 0.09 * torch.sin(2.6 * u + _die(dice, 12, 0, 6.3))
    picture = _over(picture, h - far, (0.78, 0.86, 0.94))
    for k in range(6):
        x = _die(dice, k, -0.14, 0.14) - 1.0 + 0.4 * k
        size = _die(dice, 6 + k, 0.22, 0.4)
        base = 0.06 + 0.05 * torch.sin(1.7 * x + 1.0)
        for tier in range(3):
            bottom, wide = base + (0.12 + 0.27 * tier) * size, (0.40 - 0.09 * tier) * size
            slope = (u - x).abs() / wide * 0.5 * size + (h - bottom) - 0.5 * size
            fir = torch.maximum(slope, bottom - h)
            picture = _over(picture, fir, (0.40, 0.58, 0.60))
            picture = _over(picture, torch.maximum(fir, bottom + 0.3 * size - h), (0.95, 0.98, 1.0))
        picture = _over(picture, _rect(u, h, x, base, 0.03 * size + 0.005, 0.13 * size), (0.42, 0.36, 0.36))
    near = 0.07 + 0.05 * torch.sin(1.7 * u + _die(dice, 13, 0, 6.3))
    picture = _over(picture, h - near, (0.90, 0.94, 0.98))
    return _specks(picture, u, h, dice, 0.21, 0.020, 0.45, (1.0, 1.0, 1.0))


def _snow_ground(x: Tensor, z: Tensor, dice: Tensor) -> Tensor:
    drift = torch.sin(1.6 * x + 1.1 * torch.sin(2.2 * z + _die(dice, 14, 0, 6)) + 2.4 * z)
    return _wash(x, (0.84, 0.90, 0.96), (0.92, 0.955, 0.985), 0.5 + 0.5 * drift)


def _space(u: Tensor, h: Tensor, dice: Tensor) -> Tensor:
    picture = _wash(u, (0.30, 0.24, 0.52), (0.13, 0.12, 0.36), h * 0.9)
    picture = _specks(picture, u, h, dice, 0.23, 0.016, 0.35, (1.0, 0.98, 0.88))
    picture = _specks(picture, u + 0.11, h + 0.07, dice, 0.31, 0.028, 0.72, (1.0, 1.0, 1.0))
    side = torch.where(dice[:, 0, None] < 0.5, -1.0, 1.0)
    x, y, r = side * _die(dice, 1, 0.45, 0.75), _die(dice, 2, 0.7, 0.95), _die(dice, 3, 0.15, 0.21)
    planet = _disc(u, h, x, y, r)
    tilt = (h - y) - 0.35 * (u - x)
    circle = torch.sqrt(((u - x) / 1.75) ** 2 + (3.0 * tilt) ** 2)
    band = (circle - r).abs() - 0.035
    picture = _over(picture, band, (0.78, 0.74, 0.90))
    picture = _over(picture, planet, (0.93, 0.66, 0.58))
    picture = _over(picture, torch.maximum(planet, (tilt - 0.3 * r).abs() - 0.18 * r), (0.97, 0.79, 0.68))
    picture = _over(picture, torch.maximum(band, tilt), (0.78, 0.74, 0.90))
    small_x = -side * _die(dice, 4, 0.4, 0.8)
    moon_y = _die(dice, 5, 0.75, 1.05)
    picture = _over(picture, _disc(u, h, small_x, moon_y, 0.09), (0.88, 0.90, 0.96))
    ridge = 0.1 + 0.05 * torch.sin(3.1 * u + _die(dice, 12, 0, 6.3)) + 0.02 * torch.sin(8 * u)
    return _over(picture, h - ridge, (0.52, 0.48, 0.66))


def _space_ground(x: Tensor, z: Tensor, dice: Tensor) -> Tensor:
    picture = _wash(x, (0.66, 0.64, 0.76), (0.70, 0.68, 0.80), 0.5 + 0.5 * torch.sin(2 * x + 1.7 * z))
    cell_x, cell_z = torch.floor(x / 0.8), torch.floor(z / 0.8)
    noise, more = _hash(cell_x, cell_z, dice), _hash(cell_z, cell_x, dice)
    dx, dz = x - (cell_x + 0.35 + 0.3 * more) * 0.8, z - (cell_z + 0.5) * 0.8
    crater = torch.sqrt(dx**2 + dz**2) - 0.10 - 0.14 * more + (noise < 0.3) * 2.0
    return _over(_over(picture, crater - 0.03, (0.78, 0.77, 0.87)), crater, (0.55, 0.53, 0.66))


def _kitchen(u: Tensor, h: Tensor, dice: Tensor) -> Tensor:
    picture = _wash(u, (0.86, 0.93, 0.90), (0.90, 0.95, 0.92), h)
    tile_u, tile_h = u / 0.26 + dice[:, 0, None], h / 0.26
    seam = torch.minimum((tile_u - torch.floor(tile_u) - 0.5).abs(), (tile_h - torch.floor(tile_h) - 0.5).abs())
    picture = _over(picture, torch.maximum(seam - 0.035, h - 0.82), (0.97, 0.98, 0.97))
    odd = torch.remainder(torch.floor(tile_u + 0.5) + torch.floor(tile_h + 0.5), 2)
    picture = _over(picture, torch.maximum(torch.maximum(0.04 - seam, h - 0.82), 0.5 - odd), (0.74, 0.87, 0.84))
    picture = _over(picture, (h - 0.86).abs() - 0.04, (0.72, 0.56, 0.43))
    for k in range(5):
        x = -0.85 + 0.42 * k + _die(dice, 2 + k, -0.07, 0.07)
        tall, wide = _die(dice, 8 + k, 0.07, 0.13), _die(dice, 14 + k, 0.055, 0.10)
        rgb = ((0.92, 0.80, 0.70), (0.78, 0.82, 0.90), (0.95, 0.93, 0.86), (0.80, 0.88, 0.80), (0.90, 0.78, 0.80))[k]
        picture = _over(picture, _rect(u, h, x, 0.90 + tall, wide, tall), rgb)
        picture = _over(picture, _rect(u, h, x, 0.91 + 2 * tall, wide * 0.7, 0.022), (0.62, 0.50, 0.42))
    return picture


def _kitchen_ground(x: Tensor, z: Tensor, dice: Tensor) -> Tensor:
    board = torch.floor(z / 0.42)
    grain = torch.sin(3 * x + 5 * torch.sin(1.2 * x + 9 * z) * 0.2 + 7 * _hash(board, board, dice))
    picture = _wash(x, (0.80, 0.66, 0.52), (0.85, 0.72, 0.58), 0.5 + 0.5 * grain)
    across = z / 0.42 - board
    return _over(picture, across - 0.035, (0.70, 0.55, 0.42))


def _specks(
    picture: Tensor, u: Tensor, h: Tensor, dice: Tensor, grid: float, radius: float, sparse: float, rgb: Rgb
) -> Tensor:
    """Stars or snowflakes: one to a cell at most, in a share of 1 - `sparse` of the cells."""
    cell_u, cell_h = torch.floor(u / grid), torch.floor(h / grid)
    noise, more = _hash(cell_u, cell_h, dice), _hash(cell_h + 3, cell_u, dice)
    far = _disc(
        u, h, (cell_u + 0.2 + 0.6 * noise) * grid, (cell_h + 0.2 + 0.6 * more) * grid, radius * (0.5 + 0.7 * more)
    )
    return _over(picture, far + (torch.remainder(noise * 7.3, 1.0) < sparse) * 1.0, rgb)


def _hash(a: Tensor, b: Tensor, dice: Tensor) -> Tensor:
    """A number in 0..1 per cell. Small integers in, so float32 keeps enough digits of the sine."""
    return torch.remainder(torch.sin(a * 12.9898 + b * 78.233 + 6.0 * dice[:, -1, None]) * 437.585, 1.0)


_BACKDROPS: dict[str, Painter] = {
    "meadow": _meadow,
    "beach": _beach,
    "city": _city,
    "snow": _snow,
    "space": _space,
    "kitchen": _kitchen,
}
_GROUNDS: dict[str, Painter] = {
    "meadow": _meadow_ground,
    "beach": _beach_ground,
    "city": _city_ground,
    "snow": _snow_ground,
    "space": _space_ground,
    "kitchen": _kitchen_ground,
}
