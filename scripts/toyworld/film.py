"""The "pixar" style: perspective, a warm key light with soft shadows, cool fill, rim light, gloss, shallow focus."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from scripts.toyworld.frame import FILM, Frame, ground_light, screen, trace
from scripts.toyworld.pixels import average_down, blurred, linear, mixed, srgb
from scripts.toyworld.styles import Batch, film_scenery

# Light colours are near-balanced (key times white plus fill is white), so that white things do not turn yellow.
KEY = (1.57, 1.48, 1.33)
RIM = (1.15, 1.20, 1.30)
SKY = {
    "meadow": (0.34, 0.42, 0.54),
    "beach": (0.36, 0.42, 0.53),
    "city": (0.35, 0.40, 0.52),
    "snow": (0.37, 0.43, 0.54),
    "space": (0.30, 0.32, 0.58),
    "kitchen": (0.40, 0.42, 0.46),
}
BOUNCE = {
    "meadow": (0.22, 0.28, 0.14),
    "beach": (0.34, 0.29, 0.21),
    "city": (0.24, 0.24, 0.26),
    "snow": (0.34, 0.37, 0.41),
    "space": (0.24, 0.23, 0.32),
    "kitchen": (0.34, 0.28, 0.22),
}
BRIGHTEST = 1.8
EXPOSURE = 0.92
CONTRAST = 0.45
SATURATION = 1.1


def pixar(batch: Batch) -> Tensor:
    """sRGB [B, size, size, 3]."""
    count, side = len(batch.settings), batch.size * batch.supersample
    key_B3 = _key_direction(batch.dice)
    frame = trace(batch.groups, count, FILM, side, batch.device, key_B3)
    # Brighter than this, a highlight's samples would outvote their neighbours and fray the edges.
    light = _shade(frame, batch, key_B3).clamp_max(BRIGHTEST)
    solid = (frame.thing_BN > 0).to(light.dtype)[..., None]
    things = average_down(torch.cat([light * solid, solid], -1).reshape(count, side, side, 4), batch.supersample)
    # Out of focus there is no edge to smooth, so the scenery is painted at the final size.
    scenery = _scenery(batch, key_B3)
    picture = things[..., :3] + scenery * (1 - things[..., 3:])
    return _develop(picture, batch)


def _key_direction(dice: Tensor) -> Tensor:
    """Unit vectors [B, 3] towards the key light: high in front, from the left or the right."""
    side = torch.where(dice[:, 30] < 0.5, -1.0, 1.0)
    way = torch.stack([side * (0.55 + 0.25 * dice[:, 31]), 0.95 + 0.2 * dice[:, 32], 0.62 + 0.2 * dice[:, 33]], -1)
    return normalize(way, dim=-1)


def _shade(frame: Frame, batch: Batch, key_B3: Tensor) -> Tensor:
    """Light [B, N, 3] from each pixel of the things."""
    normal = frame.normal_BN3
    albedo = linear(frame.colour_BN3)
    side = batch.size * batch.supersample
    _, direction = FILM.rays(side, batch.device)
    view = -direction
    key = key_B3[:, None]

    facing = (normal * key).sum(-1)
    # Wrapped a little past the terminator, as light does in skin and plastic.
    diffuse = ((facing + 0.18) / 1.18).clamp_min(0) * frame.lit_BN
    up = normal[..., 1]
    fill = (0.5 + 0.5 * up) * frame.open_BN
    bounce = (0.5 - 0.5 * up) * (0.4 + 0.6 * frame.open_BN)
    edge = (1 - (normal * view).sum(-1).clamp(0, 1)) ** 2.6

    sky, ground = _by_setting(SKY, batch), _by_setting(BOUNCE, batch)
    lit = diffuse[..., None] * normal.new_tensor(KEY) + fill[..., None] * sky + bounce[..., None] * ground
    light = albedo * lit

    # The rim light stands behind, opposite the key; it is half white and half the thing's own colour.
    behind = normalize(torch.stack([-key_B3[:, 0], 0.55 + 0 * key_B3[:, 0], -0.75 + 0 * key_B3[:, 0]], -1), dim=-1)
    from_behind = ((normal * behind[:, None]).sum(-1) + 0.35).clamp(0, 1)
    rim = edge * from_behind * frame.open_BN * (1 - frame.glow_BN)
    light = light + rim[..., None] * normal.new_tensor(RIM) * (0.3 + 0.7 * albedo) * 1.3

    half = normalize(key + view, dim=-1)
    glint = (normal * half).sum(-1).clamp_min(0)
    gloss = frame.gloss_BN
    shine = gloss * frame.lit_BN * (1.1 * glint**110.0 + 0.16 * glint**22.0)
    sheen = 0.10 * gloss * edge * (0.5 + 0.5 * up) * frame.open_BN
    light = light + shine[..., None] + sheen[..., None] * sky

    glow = frame.glow_BN[..., None]
    return light * (1 - glow) + albedo * glow * 1.25


def _scenery(batch: Batch, key_B3: Tensor) -> Tensor:
    """Light [B, size, size, 3] of the setting, under the things' shadows and out of focus where far away."""
    size, count = batch.size, len(batch.settings)
    painted, point, grounded = film_scenery(batch, size)
    light = linear(painted)
    index = grounded.nonzero()[:, 0]
    lit, opened = ground_light(batch.groups, point[index], key_B3)
    warm, cool = light.new_tensor(KEY) * 0.55, _by_setting(SKY, batch) * 0.8
    arriving = torch.full_like(light, 0.95).reshape(count, size * size, 3)
    arriving[:, index] = (lit[..., None] * warm + cool) * opened[..., None]
    light = light * arriving.reshape(count, size, size, 3)

    # Focus lies on z = 0. Blur grows with distance behind it and, less, in front.
    z = torch.where(grounded, point[:, 2], torch.full_like(point[:, 2], -4.0)).reshape(size, size)
    far = torch.maximum((-z - 0.5) / 2.6, (z - 0.5) / 2.5).clamp(0, 1)
    soft, softer = blurred(light, 0.009 * size), blurred(light, 0.024 * size)
    first = mixed(light, soft, (2 * far).clamp(0, 1).expand(count, -1, -1))
    return mixed(first, softer, (2 * far - 1).clamp(0, 1).expand(count, -1, -1))


def _develop(light: Tensor, batch: Batch) -> Tensor:
    """Bloom, vignette, a filmic shoulder and a little contrast; sRGB."""
    size = batch.size
    bright = (light - 0.9).clamp_min(0)
    light = light + 0.35 * blurred(bright, 0.02 * size)
    u, v = (axis.reshape(size, size) for axis in screen(size, batch.device))
    light = light * (1 - 0.16 * (u * u + v * v))[..., None] * EXPOSURE
    # The shoulder bends the brightest channel and takes the others along, so that hues survive; a share bent channel
    # by channel lets highlights go to white, as film does.
    most = light.amax(-1, keepdim=True).clamp_min(1e-4)
    kept = light * (_shoulder(most) / most)
    picture = srgb(0.7 * kept + 0.3 * _shoulder(light)).clamp(0, 1)
    # A gentle S-curve on lightness for depth; the same factor on all channels keeps the hue.
    grey = picture.mean(-1, keepdim=True)
    curved = grey + CONTRAST * (grey * grey * (3 - 2 * grey) - grey)
    picture = picture * (curved / grey.clamp_min(1e-3))
    return curved + (picture - curved) * SATURATION


def _shoulder(light: Tensor) -> Tensor:
    return 1 - torch.exp(-1.55 * light)


def _by_setting(table: dict[str, tuple[float, float, float]], batch: Batch) -> Tensor:
    return torch.tensor([table[setting] for setting in batch.settings], device=batch.device)[:, None]
