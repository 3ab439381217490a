"""Light on things and scenery in three dimensions: key light, fill, rim light, gloss, shallow focus, film.

The numbers are the "pixar" look's; a `Look` moves them, and leaves them alone where it says what that look says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, normalize

from scripts.toyworld.frame import Batch, Frame, ground_light, screen
from scripts.toyworld.pixels import blurred, linear, mixed, srgb

# Light colours are near-balanced (key times white plus fill is white), so that white things do not turn yellow.
KEY = (1.57, 1.48, 1.33)
WARMER = (0.10, 0.0, -0.22)
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


@dataclass(frozen=True)
class Surface:
    """What a material does with light."""

    gloss: float | None = None
    """None: each part's own."""
    wrap: float = 0.18
    """How far light reaches past the terminator, as it does in skin and plastic."""
    rim: float = 1.3
    bump: float = 0.0
    """How far the normal sways, over waves `1 / pitch` long."""
    pitch: float = 10.0
    grain: float = 0.0
    """Uneven colour, 0..1."""
    mirror: float = 0.0
    clear: float = 0.0


SURFACES = {
    "natural": Surface(),
    "clay": Surface(gloss=0.22, wrap=0.3, rim=0.5, bump=0.27, pitch=17.0, grain=0.06),
    "plastic": Surface(gloss=1.6, rim=0.8),
    "metal": Surface(gloss=1.5, rim=0.6, mirror=0.8),
    "felt": Surface(gloss=0.0, wrap=0.5, rim=2.2, bump=0.35, pitch=70.0, grain=0.2),
    "paper": Surface(gloss=0.0, wrap=0.1, rim=0.0, grain=0.05),
    "glass": Surface(gloss=1.8, rim=1.6, clear=0.62),
}


def key_direction(batch: Batch) -> Tensor:
    """Unit vectors [B, 3] towards the key light: in front, from the left or the right of each scene."""
    dice, look = batch.dice, batch.look
    side = torch.where(dice[:, 30] < 0.5, -1.0, 1.0)
    aside, ahead = 0.55 + 0.25 * dice[:, 31], 0.62 + 0.2 * dice[:, 33]
    cos, sin = math.cos(math.radians(look.turn_deg)), math.sin(math.radians(look.turn_deg))
    up = (0.95 + 0.2 * dice[:, 32]) * look.height
    return normalize(torch.stack([side * (aside * cos + ahead * sin), up, ahead * cos - aside * sin], -1), dim=-1)


def _key_colour(batch: Batch, like: Tensor) -> Tensor:
    return like.new_tensor(KEY) * (1 + batch.look.warmth * like.new_tensor(WARMER))


def lit_things(frame: Frame, batch: Batch, key_B3: Tensor, scenery: Tensor) -> Tensor:
    """Light [B, N, 3] from each pixel of the things; `scenery` [B, size, size, 3] shows through what is clear."""
    surface = SURFACES[batch.look.material]
    origin, direction = batch.camera.rays(batch.side, batch.device)
    normal, albedo, gloss = _bumped(frame, surface, origin, direction), linear(frame.colour_BN3), frame.gloss_BN
    if surface.gloss is not None:
        gloss = torch.full_like(gloss, surface.gloss)
    if batch.look.shading == "soft":
        gloss = gloss * 0.25
    view, key = -direction, key_B3[:, None]

    facing = (normal * key).sum(-1)
    diffuse = ((facing + surface.wrap) / (1 + surface.wrap)).clamp_min(0) * frame.lit_BN
    up = normal[..., 1]
    fill = (0.5 + 0.5 * up) * frame.open_BN
    bounce = (0.5 - 0.5 * up) * (0.4 + 0.6 * frame.open_BN)
    edge = (1 - (normal * view).sum(-1).clamp(0, 1)) ** 2.6

    sky, ground = _by_setting(SKY, batch), _by_setting(BOUNCE, batch)
    lit = diffuse[..., None] * _key_colour(batch, normal) + fill[..., None] * sky + bounce[..., None] * ground
    light = albedo * lit
    if surface.mirror:
        seen = direction - 2 * (direction * normal).sum(-1, keepdim=True) * normal
        # A studio's walls: dark below, a bright ceiling, two tall lamps.
        lamps = torch.sigmoid(14 * (torch.sin(4.2 * seen[..., 0] + 1.3) - 0.55)) * (0.4 + 0.6 * frame.lit_BN)
        room = 0.12 + 0.75 * torch.sigmoid(7 * (seen[..., 1] - 0.25)) + 0.9 * lamps
        light = light + surface.mirror * (
            (0.12 + 0.88 * albedo) * 1.6 * room[..., None] * frame.open_BN[..., None] - light
        )
    if surface.clear:
        bent = torch.stack(screen(batch.side, batch.device), -1) - 0.3 * normal[..., :2]
        at = (bent * bent.new_tensor((1.0, -1.0)))[:, None]
        behind = grid_sample(scenery.permute(0, 3, 1, 2), at, padding_mode="border", align_corners=False)[:, :, 0]
        through = behind.transpose(1, 2) * (0.10 + 1.5 * albedo) + 0.22 * albedo * (1 - facing[..., None])
        light = light + surface.clear * (1 - edge)[..., None] * (through - light)

    # The rim light stands behind, opposite the key; it is half white and half the thing's own colour.
    behind = normalize(torch.stack([-key_B3[:, 0], 0.55 + 0 * key_B3[:, 0], -0.75 + 0 * key_B3[:, 0]], -1), dim=-1)
    from_behind = ((normal * behind[:, None]).sum(-1) + 0.35).clamp(0, 1)
    rim = edge * from_behind * frame.open_BN * (1 - frame.glow_BN)
    light = light + rim[..., None] * normal.new_tensor(RIM) * (0.3 + 0.7 * albedo) * surface.rim

    half = normalize(key + view, dim=-1)
    glint = (normal * half).sum(-1).clamp_min(0)
    shine = gloss * frame.lit_BN * (1.1 * glint**110.0 + 0.16 * glint**22.0)
    sheen = 0.10 * gloss * edge * (0.5 + 0.5 * up) * frame.open_BN
    light = light + shine[..., None] + sheen[..., None] * sky

    glow = frame.glow_BN[..., None]
    # Brighter than this, a highlight's samples would outvote their neighbours and fray the edges.
    return (light * (1 - glow) + albedo * glow * 1.25).clamp_max(BRIGHTEST)


def _bumped(frame: Frame, surface: Surface, origin_N3: Tensor, direction_N3: Tensor) -> Tensor:
    """The normals of a surface that is not quite smooth; its colour becomes uneven in place."""
    if not surface.bump and not surface.grain:
        return frame.normal_BN3
    point = origin_N3 + direction_N3 * frame.depth_BN.clamp_max(9.0)[..., None]
    turned = point.roll(1, -1)
    wave = torch.sin(surface.pitch * (turned + 0.31 * torch.sin(0.45 * surface.pitch * point)))
    frame.colour_BN3.mul_(1 + surface.grain * (wave.mean(-1, keepdim=True)))
    return normalize(frame.normal_BN3 + surface.bump * wave, dim=-1) if surface.bump else frame.normal_BN3


def lit_ground(light: Tensor, point_N3: Tensor, grounded_N: Tensor, batch: Batch, key_B3: Tensor) -> Tensor:
    """The scenery's light [B, S, S, 3] under the things' shadows."""
    count, side = light.shape[:2]
    index = grounded_N.nonzero()[:, 0]
    lit, opened = ground_light(batch.groups, point_N3[index], key_B3, 5.0 / batch.look.softness)
    warm, cool = _key_colour(batch, light) * 0.55, _by_setting(SKY, batch) * 0.8
    arriving = torch.full_like(light, 0.95).reshape(count, side * side, 3)
    arriving[:, index] = (lit[..., None] * warm + cool) * opened[..., None]
    return light * arriving.reshape(count, side, side, 3)


def out_of_focus(light: Tensor, point_N3: Tensor, grounded_N: Tensor, focus: float) -> Tensor:
    """Focus lies on z = 0. Blur grows with distance behind it and, less, in front."""
    count, size = light.shape[:2]
    z = torch.where(grounded_N, point_N3[:, 2], torch.full_like(point_N3[:, 2], -4.0)).reshape(size, size)
    far = torch.maximum((-z - 0.5) / 2.6, (z - 0.5) / 2.5).clamp(0, 1) * focus
    soft, softer = blurred(light, 0.009 * size), blurred(light, 0.024 * size)
    first = mixed(light, soft, (2 * far).clamp(0, 1).expand(count, -1, -1))
    return mixed(first, softer, (2 * far - 1).clamp(0, 1).expand(count, -1, -1))


def develop(light: Tensor) -> Tensor:
    """Bloom, vignette, a filmic shoulder and a little contrast; light to sRGB."""
    size = light.shape[1]
    bright = (light - 0.9).clamp_min(0)
    light = light + 0.35 * blurred(bright, 0.02 * size)
    u, v = (axis.reshape(size, size) for axis in screen(size, light.device))
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
