"""One pass over a video: decoding, detecting in batches and encoding overlap, in three threads with short queues.

What waits between them is bounded in bytes, so that an hour takes as much memory as a minute.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from math import ceil
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Protocol

from PIL import Image

from finetune.run.plain import from_plain
from finetune.run.progress import Progress
from finetune.video import segments
from finetune.video.cuts import CutFinder, thumbnail
from finetune.video.drawing import Planes, draw
from finetune.video.page import MOST_SHOWN
from finetune.video.segments import Film, Piece
from finetune.video.source import Facts, Frame, Rgb, Source, planes, rgb
from finetune.video.tracks import Box, Detection, Tracked, Tracker, moved, patience_s

MOST_BYTES = 256 << 20  # of frames between two threads
MOST_WAITING = 64  # frames, where they are small
THUMBNAIL_WIDTH = 320
JPEG_QUALITY = 92
POLL_S = 0.2


class Finder(Protocol):
    """What finds objects: `finetune.video.detector.Detector`. names: of all classes that it knows, by number."""

    names: dict[int, str]

    def reads(self, width: int, height: int) -> tuple[int, int]: ...

    def find(self, frames: Sequence[Rgb], width: int, height: int) -> list[list[Detection]]: ...


@dataclass(frozen=True)
class Shown:
    """A frame of the source on its way. index: its number in the source. looks: the numbers of the looks that it is the
    frame of, mostly none."""

    index: int
    pts: int
    seconds: Fraction
    scene: int
    looks: tuple[int, ...]
    picture: Planes | None
    pixels: Rgb | None

    @property
    def bytes_held(self) -> int:
        held = sum(plane.nbytes for plane in self.picture or ())
        return held + (self.pixels.nbytes if self.pixels is not None else 0)


@dataclass(frozen=True)
class Ended:
    """Between two pieces. state: what the next one goes on with, as far as the thread before knows it."""

    number: int
    state: dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What was seen at the last look, as far as later frames show it."""

    seconds: float
    scene: int
    objects: tuple[Tracked, ...]


@dataclass
class Stopwatch:
    """Work done and seconds spent on it by a stage, without waiting."""

    count: int = 0
    seconds: float = 0.0

    def measured(self, since: float, count: int = 1) -> None:
        self.count += count
        self.seconds += time.perf_counter() - since

    @property
    def per_second(self) -> float:
        return self.count / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Work:
    """What a pass needs. folder: of the pieces. common: what every line says. labelled: whether films are made. images:
    the folder for the frames that were looked at, if they are wanted."""

    source: Source
    finder: Finder
    folder: Path
    rate: Fraction
    batch: int
    labelled: bool
    images: Path | None
    common: dict[str, Any]
    watches: dict[str, Stopwatch] = field(
        default_factory=lambda: {"decode": Stopwatch(), "detect": Stopwatch(), "encode": Stopwatch()}
    )


def run(work: Work, done: Sequence[Piece], progress: Progress) -> list[Piece]:
    """Do what is left behind the pieces that are done; all pieces."""
    pieces = list(done)
    stop = threading.Event()
    failures: list[BaseException] = []
    width, height = even_size(work.source.facts)
    room = max(2, min(MOST_WAITING, MOST_BYTES // (2 * width * height)))
    decoded: Queue[Any] = Queue(room)
    labelled: Queue[Any] = Queue(room)

    def guarded(body: Callable[[], None]) -> threading.Thread:
        def target() -> None:
            try:
                body()
            except BaseException as error:  # it is raised again by the thread that waits
                failures.append(error)
                stop.set()

        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        return thread

    state = done[-1].state if done else None
    threads = [
        guarded(lambda: _decode(work, state, decoded, stop)),
        guarded(lambda: _encode(work, state, labelled, stop, pieces, progress)),
    ]
    try:
        _detect(work, state, decoded, labelled, stop)
        for thread in threads:
            while thread.is_alive():
                thread.join(POLL_S)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return pieces


def shown_when(
    frames: Iterator[Frame], rate: Fraction, first: int, step: Fraction
) -> Iterator[tuple[Frame, tuple[int, ...]]]:
    """Each frame with the numbers of the looks at it: look k is at k / rate seconds and sees the last frame not later.

    first: the number of the first look that is still to come. step: how long the last frame is shown.
    """
    held: Frame | None = None
    for frame in frames:
        if held is not None:
            looks = tuple(range(first, ceil(frame.seconds * rate)))
            first += len(looks)
            yield held, looks
        held = frame
    if held is not None:
        yield held, tuple(range(first, max(first, ceil((held.seconds + step) * rate))))


def _decode(work: Work, state: dict[str, Any] | None, out: "Queue[Any]", stop: threading.Event) -> None:
    """Frames, made small for the detector and flat for the encoder, with their scenes; pieces end here."""
    source, facts, watch = work.source, work.source.facts, work.watches["decode"]
    cuts = CutFinder.from_state(state["cuts"]) if state else CutFinder()
    start, after = (state["start"], state["last_pts"]) if state else (None, None)
    first, index = (state["next_look"], state["next_index"]) if state else (0, 0)
    frames = shown_when(_timed(source.frames(start=start, after=after), watch), work.rate, first, 1 / facts.rate)
    reads, even = work.finder.reads(facts.width, facts.height), even_size(facts)
    piece, last = None, start
    for frame, looks in frames:
        since = time.perf_counter()
        start = frame.pts if start is None else start
        number = int(frame.seconds / segments.LENGTH_S)
        if piece is not None and number != piece:
            _put(out, Ended(piece, _decode_state(start, last, first, index, cuts)), stop)
        scene = cuts.look(float(frame.seconds), thumbnail(frame.picture))
        picture = planes(frame.picture, facts, *even) if work.labelled else None
        pixels = rgb(frame.picture, facts, *reads) if looks else None
        if work.images and looks:
            _save(rgb(frame.picture, facts, facts.width, facts.height), work.images, looks)
        shown = Shown(index, frame.pts, frame.seconds, scene, looks, picture, pixels)
        piece, last, first, index = number, frame.pts, first + len(looks), index + 1
        watch.seconds += time.perf_counter() - since
        _put(out, shown, stop)
        if stop.is_set():
            return
    if piece is not None:
        _put(out, Ended(piece, _decode_state(start, last, first, index, cuts)), stop)
    _put(out, None, stop)


def _decode_state(start: int | None, last: int | None, look: int, index: int, cuts: CutFinder) -> dict[str, Any]:
    return {"start": start, "last_pts": last, "next_look": look, "next_index": index, "cuts": cuts.state()}


def _save(pixels: Rgb, folder: Path, looks: Sequence[int]) -> None:
    for look in looks:
        Image.fromarray(pixels).save(folder / f"{look:06d}.jpg", quality=JPEG_QUALITY)


def _timed(frames: Iterator[Frame], watch: Stopwatch) -> Iterator[Frame]:
    while True:
        since = time.perf_counter()
        frame = next(frames, None)
        watch.measured(since, frame is not None)
        if frame is None:
            return
        yield frame


def _detect(
    work: Work, state: dict[str, Any] | None, source: "Queue[Any]", out: "Queue[Any]", stop: threading.Event
) -> None:
    """Gather frames until a batch of looks is there or memory is full, then look at all of them at once."""
    tracker = Tracker.from_state(state["tracker"]) if state else Tracker(patience_s=patience_s(float(work.rate)))
    waiting: list[Any] = []
    looks, held = 0, 0
    while not stop.is_set():
        item = _get(source, stop)
        if isinstance(item, Shown):
            looks, held = looks + bool(item.looks), held + item.bytes_held
        if item is not None:
            waiting.append(item)
        if item is None or looks >= work.batch or held >= MOST_BYTES or len(waiting) >= 2 * MOST_WAITING:
            for ready in _found(work, tracker, waiting):
                _put(out, ready, stop)
            waiting, looks, held = [], 0, 0
        if item is None:
            break
    _put(out, None, stop)


def _found(work: Work, tracker: Tracker, waiting: Sequence[Any]) -> Iterator[Any]:
    facts = work.source.facts
    looked = [item.pixels for item in waiting if isinstance(item, Shown) and item.pixels is not None]
    since = time.perf_counter()
    found = iter(work.finder.find(looked, facts.width, facts.height)) if looked else iter(())
    work.watches["detect"].measured(since, len(looked))
    for item in waiting:
        if isinstance(item, Ended):
            yield Ended(item.number, item.state | {"tracker": tracker.state()})
        elif item.pixels is not None:
            yield item, tracker.update(float(item.seconds), item.scene, next(found))
        else:
            yield item, None


def _encode(
    work: Work,
    state: dict[str, Any] | None,
    source: "Queue[Any]",
    stop: threading.Event,
    pieces: list[Piece],
    progress: Progress,
) -> None:
    """Lines and labelled frames into pieces; a piece counts when it is whole."""
    facts, watch = work.source.facts, work.watches["encode"]
    size = even_size(facts)
    every = max(1, ceil((facts.duration or 0) * float(work.rate) / MOST_SHOWN))
    film: Film | None = None
    lines: list[str] = []
    times: list[int] = []
    seen = from_plain(Seen, state["seen"]) if state else Seen(0.0, -1, ())
    scenes: list[float] = list(state["scenes"]) if state else []
    while (item := _get(source, stop)) is not None:
        since = time.perf_counter()
        if isinstance(item, Ended):
            if film is not None:
                film.close()
            piece = Piece(item.number, tuple(times), item.state | {"seen": asdict(seen), "scenes": list(scenes)})
            segments.commit(work.folder, piece, lines)
            pieces.append(piece)
            film, lines, times = None, [], []
            continue
        shown, objects = item
        if shown.scene == len(scenes):
            scenes.append(float(shown.seconds))
        if objects is not None:
            seen = Seen(float(shown.seconds), shown.scene, tuple(objects))
            lines += [line(work.common, work.rate, look, shown, objects) for look in shown.looks]
        if shown.picture is not None:
            if film is None:
                path = segments.film_path(work.folder, int(shown.seconds / segments.LENGTH_S))
                film = Film(path, size, facts.unit, facts.rate, work.source.stream.codec_context)
            draw(shown.picture, _boxes(shown, seen, work.rate, size[0] / facts.width, size[1] / facts.height))
            frame = film.write(shown.picture, shown.pts)
            if shown.looks and shown.looks[0] % every == 0:
                small = frame.reformat(THUMBNAIL_WIDTH, round(THUMBNAIL_WIDTH * size[1] / size[0]), format="rgb24")
                small.to_image().save(work.folder / f"look-{shown.looks[0]:06d}.jpg", quality=JPEG_QUALITY)
        times.append(shown.pts)
        watch.measured(since)
        progress.advance()


def line(common: dict[str, Any], rate: Fraction, look: int, shown: Shown, objects: Sequence[Tracked]) -> str:
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
    return json.dumps(about | common, ensure_ascii=False)


def _boxes(shown: Shown, seen: Seen, rate: Fraction, across: float, down: float) -> Iterator[tuple[Box, str, int]]:
    """What was seen last in this scene, moved on as it moved: between two looks boxes stay with their objects."""
    if seen.scene != shown.scene:
        return
    passed = min(float(shown.seconds) - seen.seconds, float(1 / rate))
    for one in seen.objects:
        left, top, right, bottom = moved(one.box, one.motion, passed)
        yield (left * across, top * down, right * across, bottom * down), f"{one.name} {one.track}", one.track


def even_size(facts: Facts) -> tuple[int, int]:
    """The nearest width and height that yuv420p can hold."""
    return facts.width + facts.width % 2, facts.height + facts.height % 2


def _put(queue: "Queue[Any]", item: Any, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            queue.put(item, timeout=POLL_S)
        except Full:
            continue
        return


def _get(queue: "Queue[Any]", stop: threading.Event) -> Any:
    while not stop.is_set():
        try:
            return queue.get(timeout=POLL_S)
        except Empty:
            continue
    return None
