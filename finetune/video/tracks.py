"""Which object is which from frame to frame: boxes that overlap where motion takes them get the same number.

What is left over is matched by distance: an object that was seen once may have moved by more than its size, and one
that was hidden comes out somewhere on its way. Only where it is clear which one is meant.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.run.plain import from_plain

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

LEAST_IOU = 0.2
PATIENCE_S, PATIENCE_LOOKS = 2.0, 1.5  # unseen, before an object counts as gone: the longer of the two
# Distances are in sides of the object. Chosen on simulated scenes: docs/decisions/0028-which-object-is-which.md.
REACH = 0.65  # off the way of an object whose motion is known
REACH_NEW, REACH_NEW_PER_S, MOST_REACH_NEW = 1.0, 3.0, 3.0  # from the place of one that was seen once
WAY = 2.0  # times as far as expected: what slips behind something is hidden before the last of it is
CLEARLY = 1.25  # times as far away, at least, is what else could be meant
LEAST_ALIKE, LEAST_ALIKE_BETTER = 0.15, 0.85  # of widths and heights: one side of what is half hidden is the same still
SMOOTHING = 0.5  # of the newest motion in what is expected of the next


@dataclass(frozen=True)
class Detection:
    """An object in one frame."""

    name: str
    box: Box
    score: float


@dataclass(frozen=True)
class Tracked(Detection):
    """The same with the number of its track, and its motion in pixels a second."""

    track: int
    motion: Box


@dataclass
class Track:
    """number, name, box, motion, the time it was last seen. looks: how often it was seen."""

    number: int
    name: str
    box: Box
    motion: Box
    seen: float
    looks: int = 1


@dataclass
class Tracker:
    """Numbers count up over the whole video; no track outlasts its scene."""

    next_number: int = 1
    scene: int = -1
    tracks: list[Track] = field(default_factory=list)
    patience_s: float = PATIENCE_S

    def update(self, seconds: float, scene: int, found: Sequence[Detection]) -> list[Tracked]:
        """What was found in the next frame, with track numbers, in its order."""
        if scene != self.scene:
            self.scene, self.tracks = scene, []
        self.tracks = [track for track in self.tracks if seconds - track.seen <= self.patience_s]
        expected = [moved(track.box, track.motion, seconds - track.seen) for track in self.tracks]
        owner = self._overlapping(expected, found)
        owner |= self._near(seconds, found, owner)
        tracks = {column: self.tracks[row] for column, row in owner.items()}
        return [self._seen(seconds, detection, tracks.get(column)) for column, detection in enumerate(found)]

    def _overlapping(self, expected: Sequence[Box], found: Sequence[Detection]) -> dict[int, int]:
        """Detection -> track, by number: the boxes that overlap best and are most alike first."""
        pairs = [
            (overlap * math.prod(alike(self.tracks[row].box, detection.box)), row, column)
            for row, box in enumerate(expected)
            for column, detection in enumerate(found)
            if self.tracks[row].name == detection.name and (overlap := iou(box, detection.box)) >= LEAST_IOU
        ]
        owner: dict[int, int] = {}
        for _, row, column in sorted(pairs, reverse=True):
            if column not in owner and row not in owner.values():
                owner[column] = row
        return owner

    def _near(self, seconds: float, found: Sequence[Detection], owner: dict[int, int]) -> dict[int, int]:
        """The same for what is left over, where detection and track have no other that is about as near."""
        apart = {
            (row, column): far
            for row, track in enumerate(self.tracks)
            for column, detection in enumerate(found)
            if row not in owner.values()
            and column not in owner
            and track.name == detection.name
            and (far := _apart(track, detection.box, seconds - track.seen)) <= CLEARLY
        }
        return {
            column: row
            for (row, column), far in apart.items()
            if far <= 1
            and all(other > CLEARLY * far for pair, other in apart.items() if (pair[0] == row) != (pair[1] == column))
        }

    def _seen(self, seconds: float, found: Detection, track: Track | None) -> Tracked:
        if track is None:
            track = Track(self.next_number, found.name, found.box, (0.0, 0.0, 0.0, 0.0), seconds)
            self.next_number += 1
            self.tracks.append(track)
        elif (passed := seconds - track.seen) > 0:
            newest = SMOOTHING if track.looks > 1 else 1.0
            moved = [(edge - last) / passed for edge, last in zip(found.box, track.box, strict=True)]
            left, top, right, bottom = (
                (1 - newest) * smooth + newest * fresh for smooth, fresh in zip(track.motion, moved, strict=True)
            )
            track.motion, track.box, track.seen = (left, top, right, bottom), found.box, seconds
            track.looks += 1
        return Tracked(found.name, found.box, found.score, track.number, track.motion)

    def state(self) -> dict[str, Any]:
        """Plain values that `from_state` goes on from."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Tracker":
        tracks = [from_plain(Track, row) for row in state["tracks"]]
        return cls(state["next_number"], state["scene"], tracks, state["patience_s"])


def patience_s(rate: float) -> float:
    """How long an object may be unseen, with so many looks a second."""
    return max(PATIENCE_S, PATIENCE_LOOKS / rate)


def moved(box: Box, motion: Box, seconds: float) -> Box:
    """Where a box is after some time."""
    left, top, right, bottom = (edge + speed * seconds for edge, speed in zip(box, motion, strict=True))
    return left, top, right, bottom


def _apart(track: Track, box: Box, passed: float) -> float:
    """How far a box is from where a track may have gone since, as a share of how far it may be; inf for another size.

    passed: seconds since the track was last seen.
    """
    less, more = sorted(alike(track.box, box))
    if less < LEAST_ALIKE or more < LEAST_ALIKE_BETTER:
        return math.inf
    side = math.sqrt(math.prod(max(one[2 + axis] - one[axis] for one in (track.box, box)) for axis in (0, 1)))
    before, here = middle(track.box), middle(box)
    if track.looks == 1:
        reach = min(MOST_REACH_NEW, REACH_NEW + REACH_NEW_PER_S * passed)
        return math.dist(here, before) / (reach * side)
    # The edge that slips behind something stands still; the other one still has the object's speed.
    fastest = (max(track.motion[axis], track.motion[axis + 2], key=abs) for axis in (0, 1))
    way = [WAY * speed * passed for speed in fastest]
    length = math.hypot(*way)
    along = sum(step * (x - start) for step, x, start in zip(way, here, before, strict=True)) / (length**2 or 1.0)
    nearest = [start + min(1.0, max(0.0, along)) * step for start, step in zip(before, way, strict=True)]
    return math.dist(here, nearest) / (REACH * side)


def middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def alike(one: Box, other: Box) -> tuple[float, float]:
    """The smaller width as a share of the larger, and of heights the same."""
    wide, high = ([box[side + 2] - box[side] for box in (one, other)] for side in (0, 1))
    return min(wide) / max(wide), min(high) / max(high)


def iou(one: Box, other: Box) -> float:
    """Intersection over union."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    if wide <= 0 or high <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return wide * high / (sum(areas) - wide * high)
