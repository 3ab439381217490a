"""What a picture is made with, laid over it at its final size: washes, strokes, dots, cells.

B pictures, S their side; sRGB [B, S, S, 3] in 0..1. Lengths are shares of the picture's side, so that a texture looks
the same at every size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from scripts.toyworld.pixels import blurred, mixed

PAPER = (0.975, 0.955, 0.91)
INK = (0.17, 0.12, 0.10)
CELLS = {"mosaic": 32, "pixel": 32, "low-poly": 22, "knitted": 21, "panes": 11, "oil": 50}  # across a picture
VARIANTS = 4  # of the irregular cells


@dataclass(frozen=True)
class Canvas:
    """What a texture knows of the picture besides its colours, [B, S, S], and the scenes' dice."""

    cover: Tensor
    """Share of the pixel that a thing covers."""
    tone: Tensor
    """Towards the light, -1..1; 0 in the scenery."""
    dice: Tensor


def textured(picture: Tensor, texture: str, canvas: Canvas) -> Tensor:
    if texture == "none":
        return picture
    if texture in CELLS:
        return _cells(picture, texture, canvas)
    return _OVERLAYS[texture](picture, canvas)


def _watercolour(picture: Tensor, canvas: Canvas) -> Tensor:
    """Wobbling washes, darker at their edges, uneven within, on paper that stays bare at the border."""
    washed = _shifted(picture, canvas, 0.012)
    edge = (blurred(washed, 0.012 * _side(picture)) - washed).clamp_min(0).amax(-1, keepdim=True)
    pigment = _noise(canvas, picture, 9, 0)[..., None] + 0.6 * _noise(canvas, picture, 40, 1)[..., None]
    washed = washed.clamp_min(0.02) ** (0.72 + 0.22 * pigment) * (1 - 0.9 * edge)
    line = (torch.arange(_side(picture), device=picture.device) + 0.5) / _side(picture)
    to_border = torch.minimum(line, 1 - line)
    inside = torch.minimum(to_border[:, None], to_border) - 0.035 + 0.03 * _noise(canvas, picture, 12, 2)
    return mixed(_paper(picture), washed, (inside / 0.02).clamp(0, 1) * 0.96)


def _ink(picture: Tensor, canvas: Canvas) -> Tensor:
    """Lines where the scenery's colour changes, hatching in the shade, over a light wash."""
    on_thing = canvas.cover > 0.5
    washed = mixed(_paper(picture), picture, 0.5 + 0.4 * canvas.cover)
    hatch = torch.maximum(
        _lines(canvas, picture, 45, 0.036) * ((canvas.tone < 0.3) & on_thing),
        _lines(canvas, picture, -45, 0.036) * torch.where(on_thing, canvas.tone < 0.0, picture.mean(-1) < 0.35),
    )
    return mixed(
        washed, picture.new_tensor(INK).expand_as(picture), torch.maximum(_contour(picture, canvas), 0.5 * hatch)
    )


def _crayon(picture: Tensor, canvas: Canvas) -> Tensor:
    """Waxy strokes that leave the paper's grain bare."""
    rough = _shifted(picture, canvas, 0.008)
    strokes = _streaks(canvas, picture, 35.0)
    wax = (1.05 + 0.35 * strokes + 0.75 * _noise(canvas, picture, 64, 3)).clamp(0.5, 1)
    return mixed(_paper(picture), rough * (0.95 + 0.3 * strokes)[..., None], wax)


def _pencil(picture: Tensor, canvas: Canvas) -> Tensor:
    """Coloured pencil: strokes close together where it is dark, apart where it is light."""
    dark = 1 - picture.amin(-1)
    strokes = _streaks(canvas, picture, 55.0) + 0.5 * _noise(canvas, picture, 80, 4)
    shade = 0.35 * (0.3 - canvas.tone).clamp(0, 1) * canvas.cover
    laid = (0.42 + 0.75 * dark + shade + 0.45 * strokes).clamp(0.1, 0.95)
    return mixed(_paper(picture), picture * 0.94, laid) * (1 - _contour(picture, canvas))[..., None]


def _contour(picture: Tensor, canvas: Canvas) -> Tensor:
    """Where the scenery's colour changes, 0..0.6; things have their outlines."""
    change = (picture - blurred(picture, 0.008 * _side(picture))).abs().mean(-1)
    near_thing = blurred(canvas.cover[..., None], 0.012 * _side(picture))[..., 0]
    return (change * 6 - 0.3).clamp(0, 0.6) * (1 - 6 * near_thing).clamp_min(0)


def _halftone(picture: Tensor, canvas: Canvas) -> Tensor:
    """A comic's dots: the scenery in screened colours, things nearly solid."""
    angle, step = math.radians(30), 1 / 34
    x, y = _axes(picture)
    across, along = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    far = torch.sqrt(((across / step) % 1 - 0.5) ** 2 + ((along / step) % 1 - 0.5) ** 2)
    dark = (1 - picture.mean(-1)).clamp(0, 1)
    radius = 0.16 + 0.42 * dark
    dot = ((radius - far) * step * _side(picture) + 0.5).clamp(0, 1)
    light, deep = picture + (1 - picture) * 0.5, picture * 0.82
    return mixed(mixed(light, deep, dot), picture, canvas.cover * (0.75 - 0.3 * dark))


def _cutout(picture: Tensor, canvas: Canvas) -> Tensor:
    """Paper with fibres, and a shadow below what lies on top."""
    side = _side(picture)
    drop = max(1, round(0.022 * side))
    shadow = blurred(canvas.cover.roll((drop, drop), (1, 2))[..., None], 0.012 * side)[..., 0] * (1 - canvas.cover)
    fibre = 0.05 * _noise(canvas, picture, 60, 5) + 0.03 * _streaks(canvas, picture, 10.0)
    return picture * (1 - 0.5 * shadow + fibre)[..., None]


_OVERLAYS: dict[str, Callable[[Tensor, Canvas], Tensor]] = {
    "watercolour": _watercolour,
    "ink": _ink,
    "crayon": _crayon,
    "pencil": _pencil,
    "halftone": _halftone,
    "cutout": _cutout,
}


def _cells(picture: Tensor, texture: str, canvas: Canvas) -> Tensor:
    """Every cell of a pattern in one colour, times what the pattern shades it with."""
    drawn = []
    for image, cover, die in zip(picture, canvas.cover, canvas.dice[:, 36].tolist(), strict=True):
        number, shade = _pattern(texture, _side(picture), int(die * VARIANTS))
        number, shade = number.to(image.device), shade.to(image.device)
        on_thing = (cover > 0.5).long()
        if texture in ("low-poly", "panes"):  # cut along the things' outlines
            number = 2 * number + on_thing
        cells = int(number.max()) + 1
        flat, ones = number.flatten(), torch.ones_like(cover).flatten()
        # A cell takes its colour from the thing or from the scenery, whichever holds more of it: mixing would muddy it.
        held = ones.new_zeros(cells, 2).index_put_((flat, on_thing.flatten()), ones, accumulate=True)
        counts = (held.argmax(1)[flat] == on_thing.flatten()).to(image.dtype)
        sums = ones.new_zeros(cells, 3).index_add_(0, flat, image.flatten(0, 1) * counts[:, None])
        colours = sums / held.amax(1, keepdim=True).clamp_min(1)
        if texture == "pixel":
            colours = (colours * 14).round() / 14
        drawn.append(colours[number] * shade[..., None])
    made = torch.stack(drawn)
    # Small parts that cells would swallow, such as eyes, shine through.
    lost = ((picture - made).abs().amax(-1) * 5 - 1).clamp(0, 1) * canvas.cover * _SHINE_THROUGH.get(texture, 0.0)
    return mixed(made, picture, lost).clamp(0, 1)


_SHINE_THROUGH = {"knitted": 0.5, "low-poly": 0.8, "panes": 0.7, "oil": 0.5}


@cache
def _pattern(texture: str, side: int, variant: int) -> tuple[Tensor, Tensor]:
    """The number of the cell at each pixel and the shade there, both [S, S]."""
    generator = torch.Generator().manual_seed(variant)
    count = CELLS[texture]
    line = (torch.arange(side) + 0.5) / side * count
    x, y = line.expand(side, side), line[:, None].expand(side, side)
    if texture == "low-poly":
        number = _triangles(side, count, generator)
        return number, 0.95 + 0.1 * torch.rand(int(number.max()) + 1, generator=generator)[number]
    if texture == "knitted":
        # Stitches are Vs: rows that slant up on both sides of a column's middle.
        column = x.floor()
        inside = (x - column - 0.5).abs()
        slanted = y * 1.25 + inside * 1.3
        row = slanted.floor()
        within = slanted - row
        round_ = 1.06 - 0.34 * (2 * (within - 0.5)) ** 2 - 0.30 * torch.exp(-((inside / 0.09) ** 2))
        edge = 0.22 * torch.exp(-(((0.5 - inside) / 0.07) ** 2))
        return (row * (count + 2) + column).long(), round_ - edge
    if texture in ("mosaic", "pixel"):
        index, within = line.long(), (line - line.floor() - 0.5)
        number = index[:, None] * count + index
        if texture == "pixel":
            return number, torch.ones(side, side)
        uneven = 1.04 + 0.12 * (torch.rand(count * count, generator=generator)[number] - 0.5)
        bevel = -0.12 * (within[:, None] + within)
        grout = ((-torch.minimum(within[:, None], within) - 0.3) / 0.07).clamp(0, 1)
        return number, (uneven + bevel) * (1 - 0.32 * grout)
    # Voronoi cells round the points of a shaken grid; strokes of oil are long ones, turned by a smooth field.
    shaken = 0.15 + 0.7 * torch.rand(count + 5, count + 5, 2, generator=generator)
    angle = 2.2 * torch.sin(0.17 * x + 1.9) * torch.cos(0.13 * y + 0.7) if texture == "oil" else torch.zeros(side, side)
    stretch = 2.6 if texture == "oil" else 1.0
    nearest, second = torch.full((side, side), 99.0), torch.full((side, side), 99.0)
    number = torch.zeros(side, side, dtype=torch.long)
    for down in range(-2, 3):
        for right in range(-2, 3):
            column, row = x.long() + right + 2, y.long() + down + 2
            at = shaken[row, column]
            dx, dy = column - 2 + at[..., 0] - x, row - 2 + at[..., 1] - y
            along, across = dx * angle.cos() + dy * angle.sin(), (dy * angle.cos() - dx * angle.sin()) * stretch
            far = torch.sqrt(along**2 + across**2)
            second = torch.minimum(second, torch.maximum(nearest, far))
            number = torch.where(far < nearest, row * (count + 5) + column, number)
            nearest = torch.minimum(nearest, far)
    if texture == "oil":
        bristle = 0.16 * (torch.rand((count + 5) ** 2, generator=generator)[number] - 0.5)
        return number, 1 + bristle + 0.07 * (second - nearest).clamp(0, 1) - 0.03
    lead = ((second - nearest) / 0.16 - 0.25).clamp(0, 1)
    return number, (0.08 + 0.92 * lead) * (
        1.05 + 0.25 * (torch.rand((count + 5) ** 2, generator=generator)[number] - 0.5)
    )


def _triangles(side: int, count: int, generator: torch.Generator) -> Tensor:
    """A shaken grid of squares, each cut into two triangles."""
    points = torch.arange(-1, count + 2).float()
    grid = torch.stack(torch.meshgrid(points, points, indexing="xy"), -1)
    corners = ((grid + 0.75 * (torch.rand(grid.shape, generator=generator) - 0.5)) * side / count).tolist()
    image = Image.new("I", (side, side))
    pen = ImageDraw.Draw(image)
    number = 0
    for row in range(count + 2):
        for column in range(count + 2):
            a, b = tuple(corners[row][column]), tuple(corners[row][column + 1])
            c, d = tuple(corners[row + 1][column]), tuple(corners[row + 1][column + 1])
            for triangle in ((a, b, c), (b, c, d)) if (row + column) % 2 else ((a, b, d), (a, c, d)):
                pen.polygon(triangle, fill=number)
                number += 1
    return torch.from_numpy(np.array(image)).long()


def _side(picture: Tensor) -> int:
    return picture.shape[1]


def _paper(picture: Tensor) -> Tensor:
    return picture.new_tensor(PAPER).expand_as(picture)


def _axes(picture: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of the pixel centres over 0..1, [S, S]."""
    line = (torch.arange(_side(picture), device=picture.device) + 0.5) / _side(picture)
    return line.expand(len(line), -1), line[:, None].expand(-1, len(line))


def _random(canvas: Canvas, salt: int, *shape: int) -> Tensor:
    """Uniform numbers [B, *shape], from each scene's dice."""
    rows = []
    for die in canvas.dice[:, 37].tolist():
        generator = torch.Generator().manual_seed(int(die * 2**40) + salt)
        rows.append(torch.rand(*shape, generator=generator))
    return torch.stack(rows).to(canvas.dice.device)


def _noise(canvas: Canvas, picture: Tensor, cells: int, salt: int) -> Tensor:
    """Smooth noise [B, S, S] of about -0.5..0.5, `cells` across."""
    coarse = _random(canvas, salt, 1, cells, cells) - 0.5
    return interpolate(coarse, (_side(picture), _side(picture)), mode="bilinear", align_corners=True)[:, 0]


def _streaks(canvas: Canvas, picture: Tensor, angle_deg: float) -> Tensor:
    """Noise of about -0.5..0.5 drawn out along lines at this angle, [B, S, S]."""
    x, y = _axes(picture)
    a = math.radians(angle_deg)
    along, across = x * math.cos(a) - y * math.sin(a), y * math.cos(a) + x * math.sin(a)
    at = torch.stack([across * 1.4 - 0.7, along * 1.4], -1)[None].expand(len(canvas.dice), -1, -1, -1)
    coarse = _random(canvas, 6, 1, 9, 110) - 0.5
    return grid_sample(coarse, at, mode="bilinear", padding_mode="reflection", align_corners=True)[:, 0]


def _lines(canvas: Canvas, picture: Tensor, angle_deg: float, spacing: float) -> Tensor:
    """Parallel lines a third of `spacing` wide, a little uneven: 1 on a line, [B, S, S]."""
    x, y = _axes(picture)
    a = math.radians(angle_deg)
    place = (x * math.sin(a) + y * math.cos(a)) / spacing + 0.5 * _noise(canvas, picture, 7, 7)
    return (0.5 + (0.18 - (place % 1 - 0.5).abs()) * spacing * _side(picture)).clamp(0, 1)


def _shifted(picture: Tensor, canvas: Canvas, reach: float) -> Tensor:
    """The picture pulled about by smooth noise."""
    x, y = _axes(picture)
    pulls = [_noise(canvas, picture, cells, 8 + k) for k, cells in enumerate((22, 22))]
    at = torch.stack([x + 2 * reach * pulls[0], y + 2 * reach * pulls[1]], -1) * 2 - 1
    moved = grid_sample(picture.permute(0, 3, 1, 2), at, padding_mode="border", align_corners=False)
    return moved.permute(0, 2, 3, 1)
