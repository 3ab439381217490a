"""The drawn styles: flat, ink and mosaic, each a shading of the same buffers. The film style has a file of its own.

B scenes, S the side of the traced picture, N = S x S. A style takes a `Batch` and returns sRGB [B, size, size, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.toyworld.backgrounds import paint_backdrop, paint_ground
from scripts.toyworld.frame import EYE_LEVEL, FILM, FRONTAL, GROUND_EDGE_Z, Frame, Group, screen, trace
from scripts.toyworld.pixels import average_down, grow, mixed

FLAT_HORIZON = -0.2
FLAT_LIGHT = (-0.48, 0.72, 0.5)
MOSAIC_CELLS = 30
MOSAIC_LEVELS = 9
PAPER = (0.965, 0.94, 0.88)
SEPIA = (0.17, 0.12, 0.10)


@dataclass(frozen=True)
class Batch:
    """Scenes made ready for drawing."""

    groups: Sequence[Group]
    settings: Sequence[str]
    dice: Tensor
    size: int
    supersample: int
    device: torch.device


def flat(batch: Batch) -> Tensor:
    """Plain colours in two tones, thin darker outlines, graphic scenery."""
    return average_down(_flat_picture(batch, batch.size * batch.supersample), batch.supersample)


def mosaic(batch: Batch) -> Tensor:
    """Tiles of one colour each, a little uneven, with grout between them."""
    patch = 6
    fine = _flat_picture(batch, MOSAIC_CELLS * patch)
    count = len(batch.settings)
    cells = fine.reshape(count, MOSAIC_CELLS, patch, MOSAIC_CELLS, patch, 3).transpose(2, 3).flatten(3, 4)
    # A tile takes the colour among its own that lies nearest to their mean: mixing would muddy the edges.
    far = (cells - cells.mean(3, keepdim=True)).square().sum(-1)
    nearest = far.argmin(3)[..., None, None].expand(-1, -1, -1, 1, 3)
    tiles = cells.gather(3, nearest)[..., 0, :]
    tiles = (tiles * (MOSAIC_LEVELS - 1)).round() / (MOSAIC_LEVELS - 1)

    side = batch.size * batch.supersample
    place = (torch.arange(side, device=batch.device) + 0.5) / side * MOSAIC_CELLS
    index, within = place.long(), place - place.floor() - 0.5
    picture = tiles[:, index][:, :, index]
    row, column = index[:, None].float(), index[None, :].float()
    uneven = torch.remainder(torch.sin(row * 12.99 + column * 78.23) * 43.7, 1.0) - 0.5
    bevel = -0.10 * (within[:, None] + within[None, :])
    picture = picture * (1 + 0.09 * uneven + bevel)[..., None]
    grout = torch.maximum(within.abs()[:, None], within.abs()[None, :]) > 0.44
    return average_down(torch.where(grout[..., None], picture * 0.62 + 0.16, picture).clamp(0, 1), batch.supersample)


def ink(batch: Batch) -> Tensor:
    """Sepia lines and hatching over a light wash, on paper."""
    side = batch.size * batch.supersample
    count = len(batch.settings)
    frame = trace(batch.groups, count, FILM, side, batch.device, None)
    solid = (frame.thing_BN > 0).reshape(count, side, side)
    colour = frame.colour_BN3.reshape(count, side, side, 3)
    u, v = (axis.reshape(side, side) for axis in screen(side, batch.device))
    paper, sepia = colour.new_tensor(PAPER), colour.new_tensor(SEPIA)

    # The scenery: a pale wash, and lines where its colour changes.
    scenery = film_scenery(batch, side)[0]
    seen = paper * (0.45 + 0.55 * scenery)
    grey = scenery.mean(-1)
    unit = max(1, round(side * 0.0035))
    contour = grow(grey, 1) + grow(-grey, 1) > 0.07
    picture = mixed(seen, sepia.expand_as(seen), contour * 0.38)

    light = colour.new_tensor(FLAT_LIGHT)
    light = light / light.norm()
    tone = (frame.normal_BN3 @ light).reshape(count, side, side)
    # A wash pools towards the shade; it keeps nearly the full colour, for the colour must stay legible.
    pooled = (0.90 + 0.10 * tone)[..., None] * colour
    washed = paper * 0.14 + 0.86 * pooled
    picture = torch.where(solid[..., None], washed, picture)

    wobble = 0.012 * torch.sin(9 * u + 4 * v) + 0.006 * torch.sin(31 * v - 13 * u)
    spacing = 0.042
    one = torch.remainder((u + v) * 0.7071 + wobble, spacing) < 0.2 * spacing
    two = torch.remainder((u - v) * 0.7071 + wobble, spacing) < 0.2 * spacing
    eyes = (frame.glow_BN > 0.1).reshape(count, side, side)
    hatch = solid & ~eyes & ((one & (tone < 0.30)) | (two & (tone < -0.05)))
    foot = _foot_shadow(batch, u, v) < 0
    hatch |= foot & ~solid & two
    picture = mixed(picture, sepia.expand_as(picture), hatch * 0.62)

    outer, inner = _lines(frame, count, side, unit)
    tags = frame.tag_BN.reshape(count, side, side)
    inner |= solid & (grow(tags, 1) + grow(-tags, 1) > 0)
    return average_down(mixed(picture, sepia.expand_as(picture), (outer | inner) * 0.88), batch.supersample)


def film_scenery(batch: Batch, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The film camera's empty setting: sRGB [B, S, S, 3], the ground points [N, 3] and where they count [N]."""
    count = len(batch.settings)
    origin, direction = FILM.rays(side, batch.device)
    u, v = screen(side, batch.device)
    down = direction[:, 1].clamp_max(-1e-4)
    point = origin + direction * (-origin[:, 1] / down)[:, None]
    grounded = (direction[:, 1] < -1e-4) & (point[:, 2] > GROUND_EDGE_Z)
    edge = FILM.height_of(0.0, GROUND_EDGE_Z)
    point = torch.where(grounded[:, None], point, torch.zeros_like(point))
    wide = (count, side * side)
    behind = paint_backdrop(batch.settings, u.expand(wide), (v - edge).expand(wide), batch.dice)
    below = paint_ground(batch.settings, point[:, 0].expand(wide), point[:, 2].expand(wide), batch.dice)
    painted = torch.where(grounded[:, None], below, behind)
    return painted.reshape(count, side, side, 3), point, grounded


def _flat_picture(batch: Batch, side: int) -> Tensor:
    """The flat style at its traced resolution, sRGB [B, S, S, 3]."""
    count = len(batch.settings)
    frame = trace(batch.groups, count, FRONTAL, side, batch.device, None)
    u, v = screen(side, batch.device)
    wide = (count, side * side)
    behind = paint_backdrop(batch.settings, u.expand(wide), (v - FLAT_HORIZON).expand(wide), batch.dice)
    # The strip below the horizon shows as much ground as a camera from above would see.
    z = -(v + EYE_LEVEL) * 3.2
    below = paint_ground(batch.settings, (1.25 * u).expand(wide), z.expand(wide), batch.dice)
    picture = torch.where((v < FLAT_HORIZON)[:, None], below, behind).reshape(count, side, side, 3)

    u, v = u.reshape(side, side), v.reshape(side, side)
    shadow = _foot_shadow(batch, u, v) < 0
    picture = picture * (1 - 0.2 * shadow)[..., None]

    light = picture.new_tensor(FLAT_LIGHT)
    shaded = (frame.normal_BN3 @ (light / light.norm()) < 0.08) & (frame.glow_BN < 0.1)
    colour = (frame.colour_BN3 * (1 - 0.14 * shaded)[..., None]).reshape(count, side, side, 3)
    outer, inner = _lines(frame, count, side, max(1, round(side * 0.006)))
    colour = colour * (1 - 0.30 * inner - 0.50 * (outer & ~inner) - 0.20 * (outer & inner))[..., None]
    solid = (frame.thing_BN > 0).reshape(count, side, side)
    return torch.where(solid[..., None], colour, picture)


def _lines(frame: Frame, count: int, side: int, radius: int) -> tuple[Tensor, Tensor]:
    """Outlines [B, S, S]: pixels just inside a thing's silhouette, and pixels just behind a nearer part of it."""
    thing = frame.thing_BN.reshape(count, side, side).float()
    depth = frame.depth_BN.reshape(count, side, side)
    outer = (thing > 0) & (grow(-thing, radius) > -thing)
    nearest = -grow(-depth, max(1, radius // 2 + radius % 2))
    return outer, (thing > 0) & (depth - nearest > 0.045)


def _foot_shadow(batch: Batch, u_SS: Tensor, v_SS: Tensor) -> Tensor:
    """A flat ellipse under each thing: negative inside, [B, S, S]."""
    out = torch.ones(len(batch.settings), *u_SS.shape, device=batch.device)
    for group in batch.groups:
        solids = group.solids
        scale = solids.scale_T11[:, 0]
        half = 0.46 * (solids.high_T13 - solids.low_T13)[:, 0, :1] * scale
        # The turn's first column says which way the thing's own x points.
        middle = (solids.high_T13 + solids.low_T13)[:, 0, :1] / 2 * scale * solids.turn_T33[:, 0, :1]
        x = solids.at_T13[:, 0, :1] + middle
        far = ((u_SS - x[..., None]) / half[..., None]) ** 2 + (
            (v_SS + EYE_LEVEL + 0.005) / (0.16 * half[..., None])
        ) ** 2
        out[group.scenes_T] = torch.minimum(out[group.scenes_T], far - 1)
    return out
