"""Things as padded tensors, and the signed distance to them.

T things, R points each, P part columns: the parts of a thing sorted by primitive, each primitive padded to the most
that any thing of the batch has, so that no primitive's formula runs on another's columns.
"""

# ruff: noqa: N815  (shape suffixes)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scripts.toyworld.kinds import Placed
from scripts.toyworld.parts import Part, Shape

MELT = 0.022
"""Radius over which soft parts melt into one another, in thing units."""
FAR_AWAY = 40.0  # bias of a column that must never be nearest
POINT_COLUMNS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Points times part columns evaluated at once: near the cache on a CPU, under 10 GB of temporaries on a GPU."""


@dataclass(frozen=True)
class Solids:
    """A batch of things in their own coordinates, and the way from the world into them."""

    affine_T33P: Tensor
    offset_T1P3: Tensor
    dims: tuple[Tensor, Tensor, Tensor, Tensor]  # each [T, 1, P]
    cut: tuple[Tensor, Tensor]  # each [T, 1, ellipsoid columns]
    counts: tuple[int, ...]
    """Columns per primitive, in the order of `Shape`."""
    hard_bias_T1P: Tensor
    soft_bias_T1P: Tensor
    colour_TP3: Tensor  # sRGB, 0..1
    gloss_TP: Tensor
    glow_TP: Tensor
    tag_TP: Tensor
    """An integer per material, to draw lines where it changes."""
    low_T13: Tensor
    high_T13: Tensor
    turn_T33: Tensor
    """Orthogonal: local = (world - at) @ turn / scale."""
    at_T13: Tensor
    scale_T11: Tensor

    def to_local(self, world_TR3: Tensor) -> Tensor:
        return torch.bmm(world_TR3 - self.at_T13, self.turn_T33) / self.scale_T11

    def direction_to_local(self, direction_TR3: Tensor) -> Tensor:
        return torch.bmm(direction_TR3, self.turn_T33)

    def direction_to_world(self, direction_TR3: Tensor) -> Tensor:
        return torch.bmm(direction_TR3, self.turn_T33.transpose(1, 2))


def gather_solids(things: Sequence[Placed], device: torch.device) -> Solids:
    """The tensors of these things on `device`."""
    per_shape = [[[i for i, p in enumerate(thing.parts) if p.shape is shape] for shape in Shape] for thing in things]
    counts = tuple(max(len(thing[shape]) for thing in per_shape) for shape in Shape)
    starts = np.cumsum((0, *counts))
    total, columns = len(things), int(starts[-1])

    rows: list[int] = []
    slots: list[int] = []
    parts: list[Part] = []
    rgb: list[tuple[float, float, float]] = []
    for row, thing in enumerate(things):
        for shape in Shape:
            for k, index in enumerate(per_shape[row][shape]):
                rows.append(row)
                slots.append(int(starts[shape]) + k)
                parts.append(thing.parts[index])
                rgb.append(thing.rgb[index])

    def spread(values: object, fill: float, *tail: int) -> np.ndarray:
        out = np.full((total, columns, *tail), fill, dtype=np.float32)
        out[rows, slots] = np.asarray(values, dtype=np.float32)
        return out

    frame = spread([part.frame for part in parts], 0.0, 3, 3)
    at = spread([part.at for part in parts], 0.0, 3)
    offset = -np.einsum("tpij,tpj->tpi", frame, at)
    dims = spread([part.dims for part in parts], 0.1, 4)
    cut = spread([part.cut for part in parts], 0.0, 2)[:, : counts[Shape.ELLIPSOID]]
    soft = spread([part.soft for part in parts], 0.0)
    real = spread([1.0] * len(parts), 0.0)
    tags = {name: k for k, name in enumerate(sorted({part.material.name for part in parts}))}

    yaw = np.radians([thing.yaw_deg for thing in things])
    turn = np.zeros((total, 3, 3), dtype=np.float32)
    flip = np.where([thing.mirrored for thing in things], -1.0, 1.0)
    # Columns: the thing's own axes in the world, x mirrored where asked.
    turn[:, 0, 0], turn[:, 2, 0] = flip * np.cos(yaw), -flip * np.sin(yaw)
    turn[:, 1, 1] = 1.0
    turn[:, 0, 2], turn[:, 2, 2] = np.sin(yaw), np.cos(yaw)

    def tensor(array: object) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.asarray(array, dtype=np.float32))).to(device)

    return Solids(
        affine_T33P=tensor(frame.transpose(0, 3, 2, 1).reshape(total, 3, 3 * columns)),
        offset_T1P3=tensor(offset.transpose(0, 2, 1).reshape(total, 1, 3 * columns)),
        dims=tuple(tensor(dims[:, None, :, k]) for k in range(4)),  # type: ignore[arg-type]
        cut=(tensor(cut[:, None, :, 0]), tensor(cut[:, None, :, 1])),
        counts=counts,
        hard_bias_T1P=tensor(np.where((real > 0) & (soft == 0), 0.0, FAR_AWAY)[:, None]),
        soft_bias_T1P=tensor(np.where((real > 0) & (soft > 0), 0.0, FAR_AWAY)[:, None]),
        colour_TP3=tensor(spread(rgb, 0.0, 3)),
        gloss_TP=tensor(spread([part.material.gloss for part in parts], 0.0)),
        glow_TP=tensor(spread([part.material.glow for part in parts], 0.0)),
        tag_TP=tensor(spread([tags[part.material.name] for part in parts], 0.0)),
        low_T13=tensor([[thing.low] for thing in things]),
        high_T13=tensor([[thing.high] for thing in things]),
        turn_T33=tensor(turn),
        at_T13=tensor([[thing.at] for thing in things]),
        scale_T11=tensor([[[thing.scale]] for thing in things]),
    )


def distance(solids: Solids, point_TR3: Tensor) -> Tensor:
    """Signed distance [T, R] to each thing, soft parts melted together; a slight underestimate at most."""
    step = max(1, POINT_COLUMNS[point_TR3.device.type] // (point_TR3.shape[0] * max(1, sum(solids.counts))))
    if point_TR3.shape[1] <= step:
        return _melted_distance(solids, point_TR3)
    return torch.cat([_melted_distance(solids, piece) for piece in torch.split(point_TR3, step, dim=1)], dim=1)


def nearest_part(solids: Solids, point_TR3: Tensor) -> Tensor:
    """Index [T, R] of the part column that owns each point."""
    step = max(1, POINT_COLUMNS[point_TR3.device.type] // (point_TR3.shape[0] * max(1, sum(solids.counts))))
    # Soft parts swell where they melt, so a hard part must be nearer than that to own the point.
    bias = torch.minimum(solids.hard_bias_T1P, solids.soft_bias_T1P)
    pieces = [(part_distances(solids, piece) + bias).argmin(-1) for piece in torch.split(point_TR3, step, dim=1)]
    return torch.cat(pieces, dim=1)


def _melted_distance(solids: Solids, point_TR3: Tensor) -> Tensor:
    each_TRP = part_distances(solids, point_TR3)
    hard = (each_TRP + solids.hard_bias_T1P).amin(-1)
    # Log-sum-exp melts without an order; the clamp keeps exp() inside float32.
    melting = torch.exp((each_TRP + solids.soft_bias_T1P).clamp(-1.5, 1.5) * (-1.0 / MELT)).sum(-1)
    soft = -MELT * torch.log(melting)
    return torch.minimum(hard, soft)


def part_distances(solids: Solids, point_TR3: Tensor) -> Tensor:
    """Distance [T, R, P] to every part by itself. Formulas after Inigo Quilez, "distance functions"."""
    # The CPU has the product done fastest as one matrix product; all three coordinates are then planes of P columns.
    own = torch.baddbmm(solids.offset_T1P3, point_TR3, solids.affine_T33P)
    x, y, z = torch.split(own, sum(solids.counts), dim=-1)
    out: list[Tensor] = []
    start = 0
    for shape, count in zip(Shape, solids.counts, strict=True):
        if count:
            span = slice(start, start + count)
            dims = [dim[..., span] for dim in solids.dims]
            out.append(_primitive(shape, x[..., span], y[..., span], z[..., span], dims, solids.cut))
        start += count
    return torch.cat(out, dim=-1)


def _primitive(shape: Shape, x: Tensor, y: Tensor, z: Tensor, dims: list[Tensor], cut: tuple[Tensor, Tensor]) -> Tensor:
    a, b, c, d = dims
    match shape:
        case Shape.ELLIPSOID:
            ux, uy, uz = x / a, y / b, z / c
            near = torch.sqrt(ux * ux + uy * uy + uz * uz)
            ux, uy, uz = ux / a, uy / b, uz / c
            slope = torch.sqrt(ux * ux + uy * uy + uz * uz).clamp_min(1e-5)
            ball = near * (near - 1) / slope
            return torch.maximum(ball, torch.maximum(cut[0] - y, y - cut[1]))
        case Shape.BOX:
            ex, ey, ez = x.abs() - a, y.abs() - b, z.abs() - c
            px, py, pz = ex.clamp_min(0), ey.clamp_min(0), ez.clamp_min(0)
            outside = torch.sqrt(px * px + py * py + pz * pz)
            return outside + torch.maximum(ex, torch.maximum(ey, ez)).clamp_max(0) - d
        case Shape.CONE:  # a = half height, b = bottom radius, c = top radius
            r = torch.sqrt(x * x + z * z)
            cap_r = r - torch.minimum(r, torch.where(y < 0, b, c))
            cap_y = y.abs() - a
            kx, ky = c - b, 2 * a
            along = ((c - r) * kx + (a - y) * ky) / (kx * kx + ky * ky)
            along = along.clamp(0, 1)
            side_r, side_y = r - c + kx * along, y - a + ky * along
            inside = (side_r < 0) & (cap_y < 0)
            gap = torch.sqrt(torch.minimum(cap_r * cap_r + cap_y * cap_y, side_r * side_r + side_y * side_y))
            return torch.where(inside, -gap, gap) - d
        case Shape.CAPSULE:  # a = length, b = radius at the start, c = radius at the end
            along = (y / a).clamp(0, 1)
            up = y - along * a
            return torch.sqrt(x * x + up * up + z * z) - (b + (c - b) * along)
        case Shape.TORUS:
            r = torch.sqrt(x * x + z * z) - a
            return torch.sqrt(r * r + y * y) - b
