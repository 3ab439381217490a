"""Sphere tracing of things: first hits, normals, occlusion and soft shadows, in each thing's own coordinates.

T things, R rays each. Rays that have hit or missed are packed away every few steps, so the cost follows the live ones.
"""

# ruff: noqa: N815  (shape suffixes)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from scripts.toyworld.solids import Solids, distance

STRIDE = 0.95  # ellipsoid and capsule distances are not exact; a shorter step makes up for it
PACK_EVERY = 5
MARGIN = 0.03  # thing units round the bounding box, for parts that swell as they melt


@dataclass(frozen=True)
class Hits:
    """The rays that hit, packed: row t holds its hits first, then padding where `valid` is False."""

    ray_TH: Tensor
    valid_TH: Tensor
    along_TH: Tensor
    point_TH3: Tensor


def first_hits(
    solids: Solids, origin_TR3: Tensor, direction_TR3: Tensor, tolerance_T1: Tensor, steps: int = 48
) -> Hits:
    """Where each local ray first meets its thing; `tolerance_T1` is the gap that counts as touching."""
    near, far = _box_span(solids, origin_TR3, direction_TR3, MARGIN)
    near = near.clamp_min(0)
    along = near.clone()
    rays = pack(near < far)
    origin, direction, reach = take(origin_TR3, rays), take(direction_TR3, rays), take(far, rays)
    now = take(along, rays)
    gap = torch.zeros_like(now)
    for step in range(steps):
        gap = distance(solids, origin + direction * now[..., None])
        live = (gap > tolerance_T1) & (now < reach)
        now = torch.where(live, now + gap * STRIDE, now)
        if step % PACK_EVERY == PACK_EVERY - 1:
            along.scatter_(1, rays, now)
            kept = pack(live)
            if kept.shape[1] == 0:
                break
            rays, origin, direction = take(rays, kept), take(origin, kept), take(direction, kept)
            now, reach, gap = take(now, kept), take(reach, kept), take(gap, kept)
    else:
        # A ray that grazes an edge may end between the two: it counts where it came within a few tolerances.
        now = torch.where(gap > 4 * tolerance_T1, reach, now)
        along.scatter_(1, rays, now)
    hit = (near < far) & (along < far)
    found = pack(hit)
    valid = take(hit, found) & _leading(hit, found)
    reached = take(along, found)
    return Hits(found, valid, reached, take(origin_TR3, found) + take(direction_TR3, found) * reached[..., None])


def normals(solids: Solids, point_TH3: Tensor, spread: float = 0.004) -> Tensor:
    """Unit normals [T, H, 3] from four taps on a tetrahedron."""
    total = torch.zeros_like(point_TH3)
    for corner in ((1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, 1.0, 1.0)):
        way = point_TH3.new_tensor(corner)
        total += way * distance(solids, point_TH3 + spread * way)[..., None]
    return normalize(total, dim=-1)


def openness(solids: Solids, point_TH3: Tensor, normal_TH3: Tensor) -> Tensor:
    """Ambient occlusion [T, H]: 1 in the open, towards 0 in a crease. Four taps along the normal."""
    blocked = torch.zeros_like(point_TH3[..., 0])
    weight = 1.0
    for reach in (0.02, 0.06, 0.12, 0.2):
        blocked += weight * (reach - distance(solids, point_TH3 + reach * normal_TH3)).clamp_min(0)
        weight *= 0.62
    return (1 - 3.2 * blocked).clamp(0, 1)


def light_reaching(solids: Solids, point_TH3: Tensor, light_T13: Tensor, sharpness: float, steps: int = 36) -> Tensor:
    """Soft shadow [T, H]: 1 lit, 0 dark. A ray that passes close by the thing is dimmed by how close it came."""
    light = light_T13.expand_as(point_TH3)
    near, far = _box_span(solids, point_TH3, light, 0.12)
    along = near.clamp_min(0.03)
    lit_all = torch.ones_like(along)
    rays = pack(along < far)
    if rays.shape[1] == 0:
        return lit_all
    origin, way, now, reach = take(point_TH3, rays), take(light, rays), take(along, rays), take(far, rays)
    lit = torch.ones_like(now)
    for step in range(steps):
        gap = distance(solids, origin + way * now[..., None])
        inside = now < reach
        lit = torch.where(inside, torch.minimum(lit, 0.5 + 0.5 * sharpness * gap / now), lit)
        now = now + gap.clamp(0.015, 0.09)
        if step % PACK_EVERY == PACK_EVERY - 1:
            lit_all.scatter_(1, rays, lit)
            kept = pack((now < reach) & (lit > 0))
            if kept.shape[1] == 0:
                break
            rays, origin, way = take(rays, kept), take(origin, kept), take(way, kept)
            now, reach, lit = take(now, kept), take(reach, kept), take(lit, kept)
    else:
        lit_all.scatter_(1, rays, lit)
    lit_all = lit_all.clamp(0, 1)
    return lit_all * lit_all * (3 - 2 * lit_all)


def pack(keep_TR: Tensor) -> Tensor:
    """Indices [T, K] of the kept rays of each row, K the most in any row; short rows are padded with index 0.

    Padding repeats ray 0, whose state is the same in every copy, so that writing it back changes nothing.
    """
    rows, width = keep_TR.shape
    if rows == 1:
        return keep_TR.nonzero(as_tuple=True)[1][None]
    rank = keep_TR.cumsum(1)
    most = int(rank[:, -1].max())
    slot = torch.where(keep_TR, rank - 1, most)
    index = torch.arange(width, device=keep_TR.device).expand(rows, width)
    return torch.zeros(rows, most + 1, dtype=torch.long, device=keep_TR.device).scatter_(1, slot, index)[:, :most]


def take(values: Tensor, index_TK: Tensor) -> Tensor:
    """Rows of [T, R] or [T, R, C] picked per thing."""
    if values.ndim == 2:
        return values.gather(1, index_TK)
    return values.gather(1, index_TK[..., None].expand(-1, -1, values.shape[2]))


def _leading(keep_TR: Tensor, packed_TK: Tensor) -> Tensor:
    count = keep_TR.sum(1, keepdim=True)
    return torch.arange(packed_TK.shape[1], device=keep_TR.device) < count


def _box_span(solids: Solids, origin_TR3: Tensor, direction_TR3: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Entry and exit [T, R] along each ray of the thing's bounding box; entry > exit where it misses."""
    flat = direction_TR3.abs() < 1e-6
    inverse = 1 / torch.where(flat, torch.full_like(direction_TR3, 1e-6), direction_TR3)
    one = (solids.low_T13 - margin - origin_TR3) * inverse
    two = (solids.high_T13 + margin - origin_TR3) * inverse
    return torch.minimum(one, two).amax(-1), torch.maximum(one, two).amin(-1)
