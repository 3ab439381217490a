"""The last stage of a pass: lines and labelled frames into pieces.

A frame between two looks waits for the second one, which says where its boxes are on their way to.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

from finetune.run.plain import from_plain
from finetune.video import segments
from finetune.video.cuts import CutFinder
from finetune.video.drawing import Planes, draw, stamp
from finetune.video.page import MOST_SHOWN
from finetune.video.segments import Film, Piece
from finetune.video.source import Facts, Rgb
from finetune.video.tracks import Box, Tracked, moved

MOST_HELD_BYTES = 256 << 20  # of frames that wait for the next look
THUMBNAIL_WIDTH = 320
THUMBNAIL_QUALITY = 92


@dataclass(frozen=True)
class Shown:
    """A frame of the source on its way. start: the pts of the first one. index: its number in the source. looks: the
    numbers of the looks that it is the frame of, mostly none; next_look: of the first behind it. cuts: as they are
    behind it."""

    start: int
    index: int
    pts: int
    seconds: Fraction
    scene: int
    looks: tuple[int, ...]
    next_look: int
    cuts: CutFinder
    picture: Planes | None
    pixels: Rgb | None

    @property
    def bytes_held(self) -> int:
        held = sum(plane.nbytes for plane in self.picture or ())
        return held + (self.pixels.nbytes if self.pixels is not None else 0)


@dataclass(frozen=True)
class Looked:
    """A frame behind the detector. objects: what was seen in it; None where nobody looked. tracker: its state then."""

    shown: Shown
    objects: tuple[Tracked, ...] | None
    tracker: Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """What was seen at a look. drawn_until: the time of the last frame that was drawn before the next look was known.
    All times in seconds."""

    seconds: float
    scene: int
    objects: tuple[Tracked, ...]
    drawn_until: float

    def boxes(self, seconds: float, longest: float, following: "Seen | None") -> Iterator[tuple[Tracked, Box]]:
        """Each object with its box at a later time: on a straight way to where the following look found it, or, where
        that is not known, moved on as it moved, for so many seconds at the longest."""
        found: dict[int, Box] = {}
        if following is not None and following.scene == self.scene:
            found = {one.track: one.box for one in following.objects}
            share = (seconds - self.drawn_until) / (following.seconds - self.drawn_until)
        for one in self.objects:
            if one.track in found:
                start = self._ahead(one, self.drawn_until, longest)
                yield one, between(start, found[one.track], share)
            else:
                yield one, self._ahead(one, seconds, longest)

    def _ahead(self, one: Tracked, seconds: float, longest: float) -> Box:
        return moved(one.box, one.motion, min(seconds - self.seconds, longest))


def between(start: Box, end: Box, share: float) -> Box:
    left, top, right, bottom = (edge + share * (last - edge) for edge, last in zip(start, end, strict=True))
    return left, top, right, bottom


class Writer:
    """Takes frames in their order, behind `pieces`, to which it adds every piece that is whole.

    rate: looks a second. colours: the codec context of the source. common: what every line says. damaged: as the source
    has it, which reads ahead.
    """

    def __init__(
        self,
        folder: Path,
        pieces: list[Piece],
        *,
        rate: Fraction,
        facts: Facts,
        colours: Any,
        common: Mapping[str, Any],
        damaged: set[int],
    ) -> None:
        self.folder, self.pieces, self.rate, self.facts, self.damaged = folder, pieces, rate, facts, damaged
        self.colours, self.common = colours, common
        self.size = even_size(facts)
        self.every = max(1, ceil((facts.duration or 0) * float(rate) / MOST_SHOWN))  # looks between two thumbnails
        state = pieces[-1].state if pieces else None
        self.seen = from_plain(Seen, state["seen"]) if state else Seen(0.0, -1, (), 0.0)
        self.scenes: list[float] = list(state["scenes"]) if state else []
        self.held: deque[Looked] = deque()
        self.held_bytes = 0
        self.last: Looked | None = None  # of the piece that is being written
        self.film: Film | None = None
        self.lines: list[str] = []
        self.times: list[int] = []

    def take(self, item: Looked) -> None:
        """Write a frame, or hold it until it is known what the next look saw."""
        shown, seconds = item.shown, float(item.shown.seconds)
        if item.objects is not None:
            following = Seen(seconds, shown.scene, item.objects, seconds)
            while self.held:
                self._write(self._oldest(), following)
            self.seen = following
        self.held.append(item)
        self.held_bytes += shown.bytes_held
        while self.held and (self._is_drawn(self.held[0]) or self.held_bytes > MOST_HELD_BYTES):
            # Frames that find no room go on as their objects moved, and the others glide on from there.
            oldest = self._oldest()
            self._write(oldest, None)
            self.seen = replace(self.seen, drawn_until=float(oldest.shown.seconds))

    def end(self, *, whole: bool) -> None:
        """No frame follows: the video is over, or else what came behind the last look is left for another time."""
        while self.held and whole:
            self._write(self._oldest(), None)
        self._commit()

    def _is_drawn(self, item: Looked) -> bool:
        """Whether it is known what is drawn into a frame."""
        return item.objects is not None or item.shown.picture is None

    def _oldest(self) -> Looked:
        oldest = self.held.popleft()
        self.held_bytes -= oldest.shown.bytes_held
        return oldest

    def _write(self, item: Looked, following: Seen | None) -> None:
        shown = item.shown
        if self.last is not None and _stretch(self.last.shown) != _stretch(shown):
            self._commit()
        if shown.scene == len(self.scenes):
            self.scenes.append(float(shown.seconds))
        if item.objects is not None:
            self.lines += [line(self.common, self.rate, look, shown, item.objects) for look in shown.looks]
        if shown.picture is not None:
            self._film(shown, shown.picture, following)
        self.times.append(shown.pts)
        self.last = item

    def _film(self, shown: Shown, picture: Planes, following: Seen | None) -> None:
        if self.film is None:
            path = segments.film_path(self.folder, len(self.pieces))
            self.film = Film(path, self.size, self.facts.unit, self.facts.rate, self.colours)
        draw(picture, self._boxes(shown, following))
        frame = self.film.write(picture, shown.pts)
        if shown.looks and shown.looks[0] % self.every == 0:
            width, height = self.size
            small = frame.reformat(THUMBNAIL_WIDTH, round(THUMBNAIL_WIDTH * height / width), format="rgb24")
            image = small.to_image()
            stamp(image, float(shown.seconds))
            image.save(self.folder / f"look-{shown.looks[0]:06d}.jpg", quality=THUMBNAIL_QUALITY)

    def _boxes(self, shown: Shown, following: Seen | None) -> Iterator[tuple[Box, str, int]]:
        """In the film's pixels, with a text and the number of the track."""
        if self.seen.scene != shown.scene:
            return
        across, down = self.size[0] / self.facts.width, self.size[1] / self.facts.height
        for one, (left, top, right, bottom) in self.seen.boxes(float(shown.seconds), float(1 / self.rate), following):
            yield (left * across, top * down, right * across, bottom * down), f"{one.name} {one.track}", one.track

    def _commit(self) -> None:
        """End the piece; from here on it is not done again."""
        if self.last is None:
            return
        if self.film is not None:
            self.film.close()
        shown = self.last.shown
        state = {
            "start": shown.start,
            "last_pts": shown.pts,
            "next_look": shown.next_look,
            "next_index": shown.index + 1,
            "cuts": shown.cuts.state(),
            "tracker": self.last.tracker,
            "seen": asdict(self.seen),
            "scenes": list(self.scenes),
            "damaged": sorted(self.damaged),
        }
        piece = Piece(len(self.pieces), tuple(self.times), state)
        segments.commit(self.folder, piece, self.lines)
        self.pieces.append(piece)
        self.film, self.last, self.lines, self.times = None, None, [], []


def line(common: Mapping[str, Any], rate: Fraction, look: int, shown: Shown, objects: Sequence[Tracked]) -> str:
    """A line of annotations.jsonl: what is seen at look number `look`."""
    found = [
        {
            "class": one.name,
            "bbox": [round(edge, 2) for edge in one.box],
            "score": round(one.score, 4),
            "track": one.track,
        }
        for one in objects
    ]
    about = {
        "frame_id": look,
        "timestamp_sec": round(float(look / rate), 6),
        "source_frame": shown.index,
        "pts": shown.pts,
        "pts_sec": round(float(shown.seconds), 6),
        "scene": shown.scene,
        "objects": found,
    }
    return json.dumps({**about, **common}, ensure_ascii=False)


def even_size(facts: Facts) -> tuple[int, int]:
    """The nearest width and height that yuv420p can hold."""
    return facts.width + facts.width % 2, facts.height + facts.height % 2


def _stretch(shown: Shown) -> int:
    """The number of the ten seconds that a frame is in: a piece ends with them."""
    return int(shown.seconds / segments.LENGTH_S)
