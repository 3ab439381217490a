"""Which object is which from frame to frame: boxes that overlap where motion takes them get the same number."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.run.plain import from_plain

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

LEAST_IOU = 0.2
PATIENCE_S, PATIENCE_LOOKS = 1.0, 1.5  # unseen, before an object counts as gone: the longer of the two
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
    """number, name, box, motion, the time it was last seen."""

    number: int
    name: str
    box: Box
    motion: Box
    seen: float


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
        pairs = sorted(
            (
                (iou(box, detection.box), row, column)
                for row, box in enumerate(expected)
                for column, detection in enumerate(found)
                if self.tracks[row].name == detection.name
            ),
            reverse=True,
        )
        owner: dict[int, Track] = {}
        taken: set[int] = set()
        for overlap, row, column in pairs:
            if overlap >= LEAST_IOU and row not in taken and column not in owner:
                owner[column] = self.tracks[row]
                taken.add(row)
        return [self._seen(seconds, detection, owner.get(column)) for column, detection in enumerate(found)]

    def _seen(self, seconds: float, found: Detection, track: Track | None) -> Tracked:
        if track is None:
            track = Track(self.next_number, found.name, found.box, (0.0, 0.0, 0.0, 0.0), seconds)
            self.next_number += 1
            self.tracks.append(track)
        elif (passed := seconds - track.seen) > 0:
            moved = [(edge - last) / passed for edge, last in zip(found.box, track.box, strict=True)]
            left, top, right, bottom = (
                (1 - SMOOTHING) * smooth + SMOOTHING * fresh for smooth, fresh in zip(track.motion, moved, strict=True)
            )
            track.motion, track.box, track.seen = (left, top, right, bottom), found.box, seconds
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


def iou(one: Box, other: Box) -> float:
    """Intersection over union."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    if wide <= 0 or high <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return wide * high / (sum(areas) - wide * high)
