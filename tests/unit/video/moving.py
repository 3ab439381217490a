"""Simulated shots in which it is known which box is of which thing: for counting how often a tracker errs."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.video.tracks import Box, Detection, Tracker, patience_s

WIDTH, HEIGHT, LENGTH_S = 320, 180, 8
MISSED = 0.04  # share of looks at which the detector does not find a thing that can be seen
JITTER = 0.04  # of edges, as a share of the box
Found = tuple[int, Detection]
"""The number of the thing, and where it was found."""


@dataclass(frozen=True)
class Thing:
    """size: width and height. start, speed: of its middle, in pixels and pixels a second. from_s, until_s: when it is
    there. wobble: in pixels."""

    size: tuple[float, float]
    start: tuple[float, float]
    speed: tuple[float, float]
    wobble: float = 0.0
    from_s: float = 0.0
    until_s: float = LENGTH_S

    def box(self, seconds: float) -> Box:
        passed = seconds - self.from_s
        x = self.start[0] + self.speed[0] * passed + self.wobble * math.sin(2.1 * seconds)
        y = self.start[1] + self.speed[1] * passed + self.wobble * math.cos(1.7 * seconds)
        return x - self.size[0] / 2, y - self.size[1] / 2, x + self.size[0] / 2, y + self.size[1] / 2


@dataclass(frozen=True)
class Shot:
    """wall: the left and right edge of what hides all that is behind it."""

    things: tuple[Thing, ...]
    wall: tuple[float, float] = (0.0, 0.0)


def crossing(rng: random.Random) -> Shot:
    """Two to five of about one size that pass in front of one another."""
    return Shot(tuple(_any(rng, width=(30, 70), shape=(0.7, 1.4), fastest=70) for _ in range(rng.randint(2, 5))))


def crowd(rng: random.Random) -> Shot:
    """Four to eight of one size and shape."""
    return Shot(tuple(_any(rng, width=(22, 34), shape=(2, 2), fastest=25) for _ in range(rng.randint(4, 8))))


def fast(rng: random.Random) -> Shot:
    """Each goes through the picture in a lane of its own, one to four times its width a second."""
    return Shot(tuple(_in_lane(rng, lane, (1, 4), rng.uniform(0, 3)) for lane in range(rng.randint(1, 3))))


def hidden(rng: random.Random) -> Shot:
    """Each goes behind a wall for about a second."""
    wide, middle = rng.uniform(40, 75), rng.uniform(120, 200)
    things = tuple(_in_lane(rng, lane, (1, 2), 0) for lane in range(rng.randint(1, 3)))
    return Shot(things, (middle - wide / 2, middle + wide / 2))


def replaced(rng: random.Random) -> Shot:
    """One is gone for good, and soon another of its kind comes nearby: the hardest case without looking at pixels."""
    wide, x, y, gone_s = rng.uniform(30, 50), rng.uniform(80, 240), rng.uniform(60, 120), rng.uniform(1.5, 4)
    first = Thing((wide, 0.8 * wide), (x, y), (rng.uniform(-15, 15), 0), until_s=gone_s)
    other = wide * rng.uniform(0.7, 1.3)
    place = x + rng.choice((-1, 1)) * rng.uniform(1.2, 3) * wide, y + rng.uniform(-15, 15)
    second = Thing((other, 0.8 * other), place, (rng.uniform(-40, 40), 0), from_s=gone_s + rng.uniform(0.2, 1.5))
    return Shot((first, second))


SHOTS: dict[str, Callable[[random.Random], Shot]] = {
    "crossing": crossing, "crowd": crowd, "fast": fast, "hidden": hidden, "replaced": replaced,
}  # fmt: skip


def errors(kind: str, rate: int, seeds: Sequence[int]) -> tuple[int, int]:
    """Over shots of a kind: identity switches (a thing gets a number that another had) and fragmentations (a thing that
    had a number gets a new one)."""
    switches = fragments = 0
    for seed in seeds:
        rng = random.Random(f"{kind} {seed}")
        shot, tracker = SHOTS[kind](rng), Tracker(patience_s=patience_s(rate))
        number: dict[int, int] = {}
        owner: dict[int, int] = {}
        for look in range(LENGTH_S * rate):
            found = looked(shot, look / rate, rng)
            tracked = tracker.update(look / rate, 0, [detection for _, detection in found])
            for (thing, _), one in zip(found, tracked, strict=True):
                if number.get(thing) != one.track:
                    switches += owner.get(one.track, thing) != thing
                    fragments += thing in number and owner.get(one.track, thing) == thing
                number[thing], owner[one.track] = one.track, thing
    return switches, fragments


def looked(shot: Shot, seconds: float, rng: random.Random) -> list[Found]:
    """What a detector finds in a frame: later things stand in front, and of what is half hidden the rest is boxed."""
    there = [(n, thing) for n, thing in enumerate(shot.things) if thing.from_s <= seconds < thing.until_s]
    found: list[Found] = []
    for place, (number, thing) in enumerate(there):
        whole = thing.box(seconds)
        seen = _beside(shot.wall, (max(0, whole[0]), max(0, whole[1]), min(WIDTH, whole[2]), min(HEIGHT, whole[3])))
        covered = max((_shared(seen, other.box(seconds)) for _, other in there[place + 1 :]), default=0.0)
        if min(seen[2] - seen[0], seen[3] - seen[1]) < 8 or covered > 0.75 or rng.random() < MISSED:
            continue
        left, top, right, bottom = (
            edge + rng.gauss(0, JITTER) * (whole[2 + axis % 2] - whole[axis % 2]) for axis, edge in enumerate(seen)
        )
        if min(right - left, bottom - top) > 4:
            found.append((number, Detection("thing", (left, top, right, bottom), 0.9)))
    rng.shuffle(found)
    return found


def _beside(wall: tuple[float, float], box: Box) -> Box:
    """The part of a box that a wall leaves, on the side where most of it is."""
    left, top, right, bottom = box
    if right <= wall[0] or left >= wall[1]:
        return box
    return (left, top, wall[0], bottom) if left + right < sum(wall) else (wall[1], top, right, bottom)


def _shared(box: Box, other: Box) -> float:
    """The share of a box that another covers."""
    wide, high = (min(box[2 + axis], other[2 + axis]) - max(box[axis], other[axis]) for axis in (0, 1))
    area = (box[2] - box[0]) * (box[3] - box[1])
    return max(0.0, wide) * max(0.0, high) / area if area > 0 else 0.0


def _any(rng: random.Random, width: tuple[float, float], shape: tuple[float, float], fastest: float) -> Thing:
    wide, start = rng.uniform(*width), (rng.uniform(20, WIDTH - 20), rng.uniform(55, 125))
    speed = rng.uniform(-fastest, fastest), rng.uniform(-8, 8)
    return Thing((wide, wide * rng.uniform(*shape)), start, speed, rng.uniform(0, 5))


def _in_lane(rng: random.Random, lane: int, widths_a_second: tuple[float, float], from_s: float) -> Thing:
    """From one side to the other."""
    wide, way = rng.uniform(30, 60), rng.choice((-1, 1))
    speed = way * rng.uniform(*widths_a_second) * wide
    start = (-wide / 3 if way > 0 else WIDTH + wide / 3), 40 + 50 * lane + rng.uniform(-6, 6)
    return Thing((wide, wide * rng.uniform(0.5, 1)), start, (speed, rng.uniform(-3, 3)), from_s=from_s)
