"""Draws scenes in a look: things, outlines and scenery, then palette and texture.

B scenes, S the side of the traced picture, N = S x S. Colours are sRGB in the drawn shadings, light in the lit ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.toyworld.backgrounds import paint_backdrop, paint_ground
from scripts.toyworld.frame import EYE_LEVEL, GROUND_EDGE_Z, Batch, Frame, screen, trace
from scripts.toyworld.light import develop, key_direction, lit_ground, lit_things, out_of_focus
from scripts.toyworld.pixels import average_down, blurred, grow, linear
from scripts.toyworld.textures import Canvas, textured

FLAT_HORIZON = -0.2
FLAT_LIGHT = (-0.48, 0.72, 0.5)
LINE_COLOURS = {
    "black": (0.07, 0.06, 0.08),
    "white": (0.98, 0.97, 0.94),
    "sepia": (0.20, 0.13, 0.09),
    "navy": (0.11, 0.14, 0.34),
}
PALETTES = {  # saturation, contrast, share of white, tint
    "natural": (1.0, 1.0, 0.0, (1.0, 1.0, 1.0)),
    "vivid": (1.3, 1.1, 0.0, (1.0, 1.0, 1.0)),
    "pastel": (0.82, 0.85, 0.22, (1.0, 1.0, 1.0)),
    "muted": (0.68, 0.95, 0.0, (0.99, 0.97, 0.92)),
    "warm": (1.05, 1.0, 0.0, (1.06, 0.98, 0.86)),
    "cool": (1.0, 1.05, 0.0, (0.9, 0.98, 1.08)),
}


def draw(batch: Batch) -> Tensor:
    """sRGB [B, size, size, 3]."""
    look, size, count = batch.look, batch.size, len(batch.settings)
    lit, traced = look.shading in ("soft", "glossy", "traced"), look.shading == "traced"
    key_B3 = key_direction(batch) if lit else batch.dice.new_tensor([FLAT_LIGHT]).expand(count, 3)
    frame = trace(batch, key_B3 if traced else None)

    scenery = _background(_scenery(batch, key_B3, lit=lit, traced=traced), batch)
    things = lit_things(frame, batch, key_B3, scenery) if lit else _toned(frame, batch, key_B3)
    if look.outline:
        things = _outlined(things, frame, batch, lit=lit)
    solid = (frame.thing_BN > 0).to(things.dtype)[..., None]
    layers = [things * solid, solid]
    if batch.look.texture in ("ink", "pencil"):
        layers.append(solid * (frame.normal_BN3 * key_B3[:, None]).sum(-1, keepdim=True))
    averaged = average_down(torch.cat(layers, -1).unflatten(1, (batch.side, batch.side)), size)
    cover = averaged[..., 3:4]
    picture = averaged[..., :3] + scenery * (1 - cover)
    picture = _graded(develop(picture) if lit else picture, look.palette)
    return textured(picture, look.texture, Canvas(cover[..., 0], averaged[..., 4:].sum(-1), batch.dice))


def _toned(frame: Frame, batch: Batch, key_B3: Tensor) -> Tensor:
    """Colours in two tones, or with more contrast, and a spot of gloss, in three."""
    facing = (frame.normal_BN3 * torch.nn.functional.normalize(key_B3, dim=-1)[:, None]).sum(-1)
    unlit = frame.glow_BN >= 0.1
    if batch.look.shading == "flat":
        return frame.colour_BN3 * (1 - 0.14 * ((facing < 0.08) & ~unlit))[..., None]
    shade = 0.17 * (facing < 0.42).float() + 0.2 * (facing < 0.0)
    colour = frame.colour_BN3 * (1 - shade * ~unlit)[..., None]
    spot = (facing > 0.965) & (frame.gloss_BN > 0.25)
    return torch.where(spot[..., None], colour + 0.65 * (1 - colour), colour)


def _outlined(colour: Tensor, frame: Frame, batch: Batch, *, lit: bool) -> Tensor:
    """Lines just inside a thing's silhouette, and just behind a nearer part of it."""
    look, side = batch.look, batch.side
    thing, depth = (values.unflatten(1, (side, side)) for values in (frame.thing_BN.float(), frame.depth_BN))
    radius = max(1, round(side * look.outline))
    outer = ((thing > 0) & (grow(-thing, radius) > -thing)).flatten(1)
    nearest = -grow(-depth, max(1, radius // 2 + radius % 2))
    inner = ((thing > 0) & (depth - nearest > 0.045)).flatten(1)
    if look.line == "own":
        dark = 0.30 * inner + 0.50 * (outer & ~inner) + 0.20 * (outer & inner)
        return colour * (1 - (1.6 if lit else 1.0) * dark)[..., None]
    line = colour.new_tensor(LINE_COLOURS[look.line])
    return torch.where((outer | inner)[..., None], linear(line) if lit else line, colour)


def _scenery(batch: Batch, key_B3: Tensor, *, lit: bool, traced: bool) -> Tensor:
    """The setting under the things' shadows, [B, size, size, 3]."""
    look, size = batch.look, batch.size
    # Out of focus there is no edge to smooth, so the scenery is painted at the final size.
    side = size if look.focus == 1 else batch.side
    u, v = screen(side, batch.device)
    if batch.frontal:
        # The strip below the horizon shows as much ground as a camera from above would see.
        z = -(v + EYE_LEVEL) * 3.2
        point, grounded, edge = torch.stack([1.25 * u, 0 * u, z], -1), v < FLAT_HORIZON, FLAT_HORIZON
    else:
        origin, direction = batch.camera.rays(side, batch.device)
        down = direction[:, 1].clamp_max(-1e-4)
        point = origin + direction * (-origin[:, 1] / down)[:, None]
        grounded = (direction[:, 1] < -1e-4) & (point[:, 2] > GROUND_EDGE_Z)
        edge = batch.camera.height_of(0.0, GROUND_EDGE_Z)
        point = torch.where(grounded[:, None], point, torch.zeros_like(point))
    wide = (len(batch.settings), side * side)
    behind = paint_backdrop(batch.settings, u.expand(wide), (v - edge).expand(wide), batch.dice)
    below = paint_ground(batch.settings, point[:, 0].expand(wide), point[:, 2].expand(wide), batch.dice)
    painted = torch.where(grounded[:, None], below, behind).unflatten(1, (side, side))
    if lit:
        painted = linear(painted)
    if traced and not batch.frontal:
        painted = lit_ground(painted, point, grounded, batch, key_B3)
    else:
        shadow = _foot_shadow(batch, u.reshape(side, side), v.reshape(side, side)) < 0
        painted = painted * (1 - (0.42 if lit else 0.2) * shadow)[..., None]
    if look.focus:
        painted = out_of_focus(painted, point, grounded, look.focus)
    return average_down(painted, size)


def _background(scenery: Tensor, batch: Batch) -> Tensor:
    match batch.look.background:
        case "pale":
            return scenery + 0.4 * (0.92 - scenery)
        case "blurred":
            return blurred(scenery, 0.018 * batch.size)
        case "dim":
            u, v = (axis.reshape(batch.size, batch.size) for axis in screen(batch.size, batch.device))
            return scenery * (0.75 - 0.2 * (u * u + v * v))[..., None]
    return scenery


def _graded(picture: Tensor, palette: str) -> Tensor:
    if palette == "natural":
        return picture
    saturation, contrast, white, tint = PALETTES[palette]
    grey = picture.mean(-1, keepdim=True)
    graded = (grey - 0.55) * contrast + 0.55 + saturation * (picture - grey)
    return ((graded * (1 - white) + white) * picture.new_tensor(tint)).clamp(0, 1)


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
