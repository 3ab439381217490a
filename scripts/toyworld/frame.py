"""Cameras and the per-pixel buffers that every style shades.

B scenes, N = S x S pixels of a square picture, S its side before it is averaged down. Screen u and v run from -1 to 1,
v upwards. Both cameras agree on where things stand, so that a scene keeps its layout from style to style.
"""

# ruff: noqa: N815  (shape suffixes)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from scripts.toyworld.kinds import Placed
from scripts.toyworld.looks import Look
from scripts.toyworld.march import first_hits, light_reaching, normals, openness, pack, take
from scripts.toyworld.solids import Solids, distance, gather_solids, nearest_part

EYE_LEVEL = 0.58
"""World height of the picture's centre: the ground under the things lies at v = -0.58."""
GROUND_EDGE_Z = -3.2
"""Where the film's ground ends and its painted backdrop stands."""


@dataclass(frozen=True)
class Camera:
    """Looks along -z at (0, EYE_LEVEL, 0), where the picture spans -1..1; no `away` means parallel rays."""

    away: float | None
    pitch_deg: float = 0.0

    def rays(self, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Origins and unit directions [N, 3] of a picture's rays, row by row from the top left."""
        u, v = screen(side, device)
        a = math.radians(self.pitch_deg)
        up = torch.tensor([0.0, math.cos(a), -math.sin(a)], device=device)
        back = torch.tensor([0.0, math.sin(a), math.cos(a)], device=device)
        right = torch.tensor([1.0, 0.0, 0.0], device=device)
        target = torch.tensor([0.0, EYE_LEVEL, 0.0], device=device)
        on_plane = target + u[:, None] * right + v[:, None] * up
        if self.away is None:
            return on_plane + 4.0 * back, (-back).expand_as(on_plane)
        origin = (target + self.away * back).expand_as(on_plane)
        return origin, normalize(on_plane - origin, dim=-1)

    def height_of(self, y: float, z: float) -> float:
        """Screen v of the world point (0, y, z)."""
        a = math.radians(self.pitch_deg)
        up, back = (y - EYE_LEVEL) * math.cos(a) - z * math.sin(a), (y - EYE_LEVEL) * math.sin(a) + z * math.cos(a)
        return up if self.away is None else up * self.away / (self.away - back)


@dataclass
class Frame:
    """What each pixel sees; colours are sRGB in 0..1, background pixels hold zeros and an infinite depth."""

    depth_BN: Tensor
    thing_BN: Tensor
    """0 background, 1 or 2 the thing."""
    tag_BN: Tensor
    """The material's number, -1 for the background."""
    colour_BN3: Tensor
    normal_BN3: Tensor
    """In the world."""
    gloss_BN: Tensor
    glow_BN: Tensor
    lit_BN: Tensor
    """Key light that arrives, 0..1; 1 where it was not asked for."""
    open_BN: Tensor
    """Ambient light that arrives, 0..1; likewise."""


@dataclass(frozen=True)
class Group:
    """The first or the second thing of those scenes that have one."""

    scenes_T: Tensor
    solids: Solids


@dataclass(frozen=True)
class Batch:
    """Scenes made ready for drawing in one look."""

    groups: Sequence[Group]
    settings: Sequence[str]
    dice: Tensor
    look: Look
    size: int
    side: int
    """Of the traced picture, in pixels."""
    device: torch.device

    @property
    def frontal(self) -> bool:
        return self.look.pitch_deg == 0

    @property
    def camera(self) -> Camera:
        return Camera(None) if self.frontal else Camera(self.look.away, self.look.pitch_deg)


def group_things(placed: Sequence[Sequence[Placed]], device: torch.device) -> list[Group]:
    """The things of a batch of scenes as tensors: the first thing of each scene, then the second of those with two."""
    groups = []
    for slot in range(max(len(things) for things in placed)):
        rows = [row for row, things in enumerate(placed) if len(things) > slot]
        solids = gather_solids([placed[row][slot] for row in rows], device)
        groups.append(Group(torch.tensor(rows, device=device), solids))
    return groups


def trace(batch: Batch, light_B3: Tensor | None) -> Frame:
    """The buffers of the batch's pictures; `light_B3` asks for shadow and occlusion too."""
    device, scenes, count = batch.device, len(batch.settings), batch.side**2
    zeros = torch.zeros(scenes, count, device=device)
    frame = Frame(
        depth_BN=torch.full_like(zeros, torch.inf),
        thing_BN=torch.zeros(scenes, count, dtype=torch.int8, device=device),
        tag_BN=torch.full_like(zeros, -1.0),
        colour_BN3=torch.zeros(scenes, count, 3, device=device),
        normal_BN3=torch.zeros(scenes, count, 3, device=device),
        gloss_BN=zeros.clone(),
        glow_BN=zeros.clone(),
        lit_BN=torch.ones_like(zeros),
        open_BN=torch.ones_like(zeros),
    )
    for slot, group in enumerate(batch.groups):
        _trace_group(frame, batch, group, slot + 1, light_B3)
    return frame


def _trace_group(frame: Frame, batch: Batch, group: Group, number: int, light_B3: Tensor | None) -> None:
    solids, side = group.solids, batch.side
    things = len(group.scenes_T)
    origin_N3, direction_N3 = batch.camera.rays(side, batch.device)
    origin = solids.to_local(origin_N3.expand(things, -1, -1))
    direction = solids.direction_to_local(direction_N3.expand(things, -1, -1))
    pixel = 2.0 / side / solids.scale_T11[:, :, 0]
    hits = first_hits(solids, origin, direction, tolerance_T1=0.35 * pixel)
    if hits.ray_TH.shape[1] == 0:
        return
    normal = normals(solids, hits.point_TH3)
    owner = nearest_part(solids, hits.point_TH3)
    depth = torch.where(hits.valid_TH, hits.along_TH * solids.scale_T11[:, :, 0], torch.inf)

    # Padding repeats ray 0 with no depth, so it must lose against whatever is there: write only real, nearer hits.
    rows = group.scenes_T[:, None].expand_as(hits.ray_TH)
    won = hits.valid_TH & (depth < frame.depth_BN[rows, hits.ray_TH])
    to = (rows[won], hits.ray_TH[won])
    frame.depth_BN[to] = depth[won]
    frame.thing_BN[to] = number
    frame.tag_BN[to] = take(solids.tag_TP, owner)[won]
    frame.colour_BN3[to] = take(solids.colour_TP3, owner)[won]
    frame.normal_BN3[to] = solids.direction_to_world(normal)[won]
    frame.gloss_BN[to] = take(solids.gloss_TP, owner)[won]
    frame.glow_BN[to] = take(solids.glow_TP, owner)[won]
    if light_B3 is not None:
        light = solids.direction_to_local(light_B3[group.scenes_T][:, None])
        raised = hits.point_TH3 + 0.012 * normal
        frame.lit_BN[to] = light_reaching(solids, raised, light, 9.0 / batch.look.softness)[won]
        frame.open_BN[to] = openness(solids, hits.point_TH3, normal)[won]


def ground_light(
    groups: Sequence[Group], point_N3: Tensor, light_B3: Tensor, sharpness: float
) -> tuple[Tensor, Tensor]:
    """Key light and openness [B, N] at points of the ground, under the shadows of all things."""
    scenes = light_B3.shape[0]
    lit = torch.ones(scenes, point_N3.shape[0], device=point_N3.device)
    opened = torch.ones_like(lit)
    for group in groups:
        solids = group.solids
        local = solids.to_local(point_N3.expand(len(group.scenes_T), -1, -1))
        light = solids.direction_to_local(light_B3[group.scenes_T][:, None])
        lit[group.scenes_T] *= light_reaching(solids, local, light, sharpness)
        # Contact: the ground darkens where a thing is close; only points round the thing's foot are worth asking.
        middle, half = (solids.low_T13 + solids.high_T13) / 2, (solids.high_T13 - solids.low_T13) / 2
        rays = pack(((local - middle).abs() - half).amax(-1) < 0.25)
        if rays.shape[1]:
            gap = distance(solids, take(local, rays)).clamp_min(0)
            near = torch.ones_like(local[..., 0]).scatter(1, rays, 1 - 0.72 * torch.exp(-gap / 0.075))
            opened[group.scenes_T] *= near
    return lit, opened


def screen(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """u and v [N] of the pixel centres."""
    steps = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side * 2 - 1
    v, u = torch.meshgrid(-steps, steps, indexing="ij")
    return u.reshape(-1), v.reshape(-1)
