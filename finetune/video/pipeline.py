"""One pass over a video: decoding, detecting in batches and encoding overlap, in three threads with short queues.

What waits between them is bounded in bytes, so that an hour takes as much memory as a minute.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Protocol

from PIL import Image

from finetune.errors import Interrupted
from finetune.run.progress import Progress
from finetune.run.signals import Stop, cause
from finetune.video.cuts import CutFinder, thumbnail
from finetune.video.segments import Piece
from finetune.video.source import Frame, Rgb, Source, planes, rgb
from finetune.video.tracks import Detection, Tracker, patience_s
from finetune.video.writer import Looked, Shown, Writer, even_size

MOST_BYTES = 256 << 20  # of frames between two threads
MOST_WAITING = 64  # frames, where they are small
JPEG_QUALITY = 92
POLL_S = 0.2
NEVER = Stop()  # to end early


class Finder(Protocol):
    """What finds objects: `finetune.video.detector.Detector`. names: of all classes that it knows, by number."""

    names: dict[int, str]

    def reads(self, width: int, height: int) -> tuple[int, int]: ...

    def find(self, frames: Sequence[Rgb], width: int, height: int) -> list[list[Detection]]: ...


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


@dataclass(frozen=True)
class Over:
    """What stands behind the last frame. whole: of the video; otherwise a signal ended the pass."""

    whole: bool


def run(work: Work, done: Sequence[Piece], progress: Progress, asked: Stop) -> list[Piece]:
    """Do what is left behind the pieces that are done; all pieces.

    Raises Interrupted where `asked` says so, once a last, shorter piece holds what was done until then.
    """
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
    work.source.damaged.update(state.get("damaged", ()) if state else ())
    decoder = guarded(lambda: _decode(work, state, decoded, stop))
    encoder = guarded(lambda: _encode(work, labelled, stop, pieces, progress))
    try:
        whole = _detect(work, state, decoded, labelled, stop, asked)
        while encoder.is_alive():
            encoder.join(POLL_S)
    finally:
        stop.set()
        for thread in (decoder, encoder):
            thread.join()
    if failures:
        raise failures[0]
    if asked.number is not None and not whole:
        raise Interrupted(f"stopped by {cause(asked.number)} {_reached(work, pieces)}", asked.number)
    return pieces


def _reached(work: Work, pieces: Sequence[Piece]) -> str:
    state, name = (pieces[-1].state if pieces else None), work.source.path.name
    if state is None:
        return f"before the first look at {name}; the same command begins again"
    seconds = float((state["last_pts"] - state["start"]) * work.source.facts.unit)
    return f"after {seconds:.1f} s of {name}; the same command goes on from there"


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
    """Frames, made small for the detector and flat for the encoder, with their scenes."""
    source, facts, watch = work.source, work.source.facts, work.watches["decode"]
    cuts = CutFinder.from_state(state["cuts"]) if state else CutFinder()
    start, after = (state["start"], state["last_pts"]) if state else (None, None)
    first, index = (state["next_look"], state["next_index"]) if state else (0, 0)
    frames = shown_when(_timed(source.frames(start=start, after=after), watch), work.rate, first, 1 / facts.rate)
    reads, even = work.finder.reads(facts.width, facts.height), even_size(facts)
    for frame, looks in frames:
        since = time.perf_counter()
        start = frame.pts if start is None else start
        scene = cuts.look(float(frame.seconds), thumbnail(frame.picture))
        picture = planes(frame.picture, facts, *even) if work.labelled else None
        pixels = rgb(frame.picture, facts, *reads) if looks else None
        if work.images and looks:
            _save(rgb(frame.picture, facts, facts.width, facts.height), work.images, looks)
        first += len(looks)
        shown = Shown(start, index, frame.pts, frame.seconds, scene, looks, first, replace(cuts), picture, pixels)
        index += 1
        watch.seconds += time.perf_counter() - since
        _put(out, shown, stop)
        if stop.is_set():
            return
    _put(out, None, stop)


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
    work: Work,
    state: dict[str, Any] | None,
    source: "Queue[Any]",
    out: "Queue[Any]",
    stop: threading.Event,
    asked: Stop,
) -> bool:
    """Gather frames until a batch of looks is there or memory is full, then look at all of them at once. Whether the
    video's end was reached."""
    tracker = Tracker.from_state(state["tracker"]) if state else Tracker(patience_s=patience_s(float(work.rate)))
    waiting: list[Shown] = []
    looks, held, whole = 0, 0, False
    while not (whole or stop.is_set() or asked.number):
        shown = _get(source, stop)
        if shown is not None:
            looks, held = looks + bool(shown.looks), held + shown.bytes_held
            waiting.append(shown)
        if shown is None or looks >= work.batch or held >= MOST_BYTES or len(waiting) >= 2 * MOST_WAITING:
            for ready in _found(work, tracker, waiting):
                _put(out, ready, stop)
            waiting, looks, held = [], 0, 0
        whole = shown is None
    _put(out, Over(whole), stop)
    return whole


def _found(work: Work, tracker: Tracker, waiting: Sequence[Shown]) -> Iterator[Looked]:
    facts = work.source.facts
    looked = [shown.pixels for shown in waiting if shown.pixels is not None]
    since = time.perf_counter()
    found = iter(work.finder.find(looked, facts.width, facts.height)) if looked else iter(())
    work.watches["detect"].measured(since, len(looked))
    state = tracker.state()
    for shown in waiting:
        objects = None
        if shown.pixels is not None:
            objects = tuple(tracker.update(float(shown.seconds), shown.scene, next(found)))
            state = tracker.state()
        yield Looked(replace(shown, pixels=None), objects, state)


def _encode(work: Work, source: "Queue[Any]", stop: threading.Event, pieces: list[Piece], progress: Progress) -> None:
    facts, colours, damaged = work.source.facts, work.source.stream.codec_context, work.source.damaged
    writer = Writer(
        work.folder, pieces, rate=work.rate, facts=facts, colours=colours, common=work.common, damaged=damaged
    )
    while isinstance(item := _get(source, stop), Looked):
        since = time.perf_counter()
        writer.take(item)
        work.watches["encode"].measured(since)
        progress.advance()
    if item is not None:  # no other thread failed
        writer.end(whole=item.whole)


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
