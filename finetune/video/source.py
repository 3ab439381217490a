"""A video file as upright frames with exact times, whatever it is like: variable rate, rotated, squeezed, interlaced.

Times are fractions of a second, so that no rounding decides which frame is shown when.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from finetune.errors import DataError
from finetune.reading import require_file
from finetune.run.progress import plural

EXTENSIONS = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".ts",
    ".mts",
    ".m2ts",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ogv",
    ".3gp",
    ".mxf",
)
LEAST_MISSING_S, MISSING_SHARE = 0.5, 0.05  # at the end, before a file counts as cut off: sound may last longer
LEAST_SIDE = 16  # pixels; below, nothing can be seen
STILL = ("image2", "_pipe", "gif", "apng", "webp", "ico")  # in the names of FFmpeg's readers of pictures

Rgb = NDArray[np.uint8]


@dataclass(frozen=True)
class Facts:
    """width, height: as a screen shows it, upright and with square pixels. turns: quarter turns to the left that make
    it upright. unit: of pts, in seconds. duration: in seconds, as the file claims, or None."""

    width: int
    height: int
    turns: int
    unit: Fraction
    rate: Fraction
    duration: float | None


@dataclass(frozen=True)
class Frame:
    """One decoded frame. pts: its time in units of the stream. seconds: the same since the first frame."""

    pts: int
    seconds: Fraction
    picture: Any


class Source:
    """An open video. damaged: where packets lie that could not be decoded; FFmpeg's decoders hide what they can."""

    def __init__(self, path: Path, container: Any, stream: Any, first: Any) -> None:
        self.path, self.container, self.stream = path, container, stream
        self.damaged: set[int] = set()
        self.cut_off = False
        self.facts = _facts(stream, first)

    def frames(self, *, start: int | None = None, after: int | None = None) -> Iterator[Frame]:
        """Every frame in the order of its time. start: the pts that counts as 0 s, of the first frame by itself. after:
        only frames behind this pts, which a cut run has done already.

        Frames without a time follow the one before at the stream's rate; frames that don't come later than the one
        before are left out.
        """
        if after is not None and not self._seek(after):
            self._rewind()
        previous: int | None = None
        step = max(1, int(1 / (self.facts.rate * self.facts.unit)))
        for picture in _progressive(self._decoded()):
            pts = _pts(picture, self.facts.unit)
            if pts is None:
                pts = 0 if previous is None else previous + step
            if previous is not None and pts <= previous:
                continue
            previous = pts
            start = pts if start is None else start
            if after is None or pts > after:
                yield Frame(pts, (pts - start) * self.facts.unit, picture)

    def damage_said(self, seconds: float) -> str:
        """What is wrong with the file, of which so many seconds could be read; empty where nothing is."""
        claimed = self.facts.duration or 0.0
        said = [f"{plural(len(self.damaged), 'packet')} left out"] if self.damaged else []
        if claimed - seconds > max(LEAST_MISSING_S, MISSING_SHARE * claimed):
            said.append(f"it ends after {seconds:.1f} of the {claimed:.1f} s that it claims")
        elif self.cut_off:
            said.append("it ends in the middle")
        return ", ".join(said)

    def _decoded(self) -> Iterator[Any]:
        """Frames as the decoder has them; damaged packets are noted and left out."""
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.error.FFmpegError, EOFError):  # the file ends in the middle of something
                self.cut_off = True
                with suppress(av.error.FFmpegError, EOFError):
                    yield from self.stream.decode(None)
                return
            try:
                yield from packet.decode()
            except EOFError:
                return
            except av.error.FFmpegError:
                self.damaged.add(len(self.damaged) if packet.pos is None else packet.pos)

    def _seek(self, pts: int) -> bool:
        """Go to the last key frame at or before this time. False where the file can't."""
        try:
            self.container.seek(pts, stream=self.stream, backward=True)
            found = next(iter(self._decoded()), None)
            began = None if found is None else _pts(found, self.facts.unit)
            if began is None or began > pts:
                return False
            self.container.seek(pts, stream=self.stream, backward=True)
        except (av.error.FFmpegError, EOFError):
            return False
        return True

    def _rewind(self) -> None:
        """Begin again, in a container of its own: not every file can seek back."""
        self.container.close()
        self.container = av.open(str(self.path))
        self.stream = _video_stream(self.path, self.container)


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """The video at this path. Raises DataError for what is none, saying what it is instead."""
    container = _opened(path)
    try:
        stream = _video_stream(path, container)
        first = _first_frame(path, container, stream)
        container.close()
        container = av.open(str(path))
        source = Source(path, container, _video_stream(path, container), first)
        try:
            yield source
        finally:
            container = source.container
    finally:
        container.close()


def rgb(picture: Any, facts: Facts, width: int, height: int) -> Rgb:
    """A frame upright, in this size: [height, width, 3]."""
    size = (height, width) if facts.turns % 2 else (width, height)
    found: Rgb = picture.reformat(*size, format="rgb24", interpolation="AREA").to_ndarray()
    return np.ascontiguousarray(np.rot90(found, facts.turns))


def planes(picture: Any, facts: Facts, width: int, height: int) -> tuple[NDArray[np.uint8], ...]:
    """A frame upright as Y [height, width] and U, V [height/2, width/2], for an encoder; the sides are even."""
    size = (height, width) if facts.turns % 2 else (width, height)
    packed = picture.reformat(*size, format="yuv420p").to_ndarray()
    wide, high = size
    luma, chroma = packed[:high], packed[high:].reshape(2, high // 2, wide // 2)
    return tuple(np.rot90(plane, facts.turns).copy() for plane in (luma, *chroma))


def videos_in(folder: Path) -> list[Path]:
    """Every video of a folder, by name. Raises DataError where there is none."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; name one that holds videos: folder=DIR")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not found:
        raise DataError(f"{folder} holds no video; read are {' '.join(EXTENSIONS)}")
    return found


def _opened(path: Path) -> Any:
    try:
        require_file(path)
        if path.is_dir():
            raise DataError(f"{path} is a folder; name a file of it: video=FILE")
        if not path.stat().st_size:
            raise DataError(f"{path} is empty")
        return av.open(str(path))
    except (OSError, av.error.FFmpegError) as error:
        if not path.exists():
            raise DataError(f"there is no video {path}; name a file: video=FILE") from error
        raise DataError(f"{path} can't be read as a video ({_reason(error)}); is it whole?") from error


def _video_stream(path: Path, container: Any) -> Any:
    covers = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams if stream.type != "video"}) or ["nothing"]
        raise DataError(f"{path} has no video stream, only {' and '.join(kinds)}")
    stream = streams[0]
    stream.thread_type = "AUTO"
    return stream


def _first_frame(path: Path, container: Any, stream: Any) -> Any:
    decoded, reason = [], "no frame in it can be decoded"
    try:
        for packet in container.demux(stream):
            with suppress(av.error.InvalidDataError):
                decoded += packet.decode()
            if len(decoded) > 1:
                break
    except (av.error.FFmpegError, EOFError) as error:
        reason = _reason(error)
    if not decoded:
        raise DataError(f"{path} is damaged ({reason}); get it again")
    if len(decoded) == 1 and any(word in container.format.name for word in STILL):
        raise DataError(f"{path} is a still picture, not a video; images go into a folder: data.folder=DIR")
    first = decoded[0]
    if min(first.width, first.height) < LEAST_SIDE:
        raise DataError(f"{path} is {first.width}×{first.height} pixels; at least {LEAST_SIDE}×{LEAST_SIDE} are needed")
    return first


def _facts(stream: Any, first: Any) -> Facts:
    shape = stream.sample_aspect_ratio or Fraction(1)
    width, height = first.width, first.height
    # The longer side grows, so that no detail is lost.
    if shape > 1:
        width = round(width * shape)
    elif 0 < shape < 1:
        height = round(height / shape)
    turns = round(first.rotation / 90) % 4
    if turns % 2:
        width, height = height, width
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    duration = None
    if stream.duration:
        duration = float(stream.duration * stream.time_base)
    elif stream.container.duration:
        duration = stream.container.duration / av.time_base
    return Facts(width, height, turns, Fraction(stream.time_base), Fraction(rate), duration)


def _pts(picture: Any, unit: Fraction) -> int | None:
    """In units of the stream: filters count in others."""
    if picture.pts is None:
        return None
    return int(picture.pts) if picture.time_base in (None, unit) else round(picture.pts * picture.time_base / unit)


def _progressive(pictures: Iterator[Any]) -> Iterator[Any]:
    """Whole frames, from the first interlaced one on through FFmpeg's yadif, which leaves whole ones as they are."""
    graph = None
    for picture in pictures:
        if graph is None and not picture.interlaced_frame:
            yield picture
            continue
        if graph is None:
            graph = _deinterlacer(picture)
        graph.push(picture)
        yield from _pulled(graph)
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph)


def _deinterlacer(picture: Any) -> Any:
    graph = av.filter.Graph()
    ends = graph.add_buffer(
        width=picture.width, height=picture.height, format=picture.format.name, time_base=picture.time_base
    )
    graph.link_nodes(ends, graph.add("yadif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _pulled(graph: Any) -> Iterator[Any]:
    with suppress(av.error.BlockingIOError, EOFError):
        while True:
            yield graph.pull()


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
