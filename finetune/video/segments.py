"""What a run has finished, in pieces of some seconds: a film that plays, its lines, and what the next goes on with.

A piece counts once its `.json` is there, which is written last; whatever a kill leaves beside is written again.
"""

import heapq
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from operator import itemgetter
from pathlib import Path
from typing import Any

import av
import numpy as np

from finetune.errors import RunError
from finetune.reading import read_text
from finetune.run.atomic import write_atomically
from finetune.run.plain import UNREADABLE, from_plain
from finetune.run.progress import say
from finetune.video.drawing import Planes

LENGTH_S = 10
INPUT = "input"  # the file that says of what the pieces of a folder are
ENCODER = {"preset": "veryfast", "crf": "23", "bf": "0"}  # without B-frames pieces join without a gap in their times
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}  # a cut file plays up to its last fragment


@dataclass(frozen=True)
class Piece:
    """number, the pts of its frames, and the state behind its last one."""

    number: int
    pts: tuple[int, ...]
    state: dict[str, Any]


class Film:
    """The encoder of one piece. size: width and height, both even."""

    def __init__(self, path: Path, size: tuple[int, int], unit: Fraction, rate: Fraction, colours: Any) -> None:
        self.path = path
        self.partial = path.with_suffix(".partial")
        self.container = av.open(str(self.partial), "w", format="mp4", options=FRAGMENTS)
        stream: Any = self.container.add_stream("libx264", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt, stream.options = "yuv420p", ENCODER
        stream.codec_context.time_base = stream.time_base = unit
        if colours.colorspace:  # 0 is RGB, which these planes are not
            for name in ("color_primaries", "color_trc", "colorspace"):
                setattr(stream.codec_context, name, getattr(colours, name))
        self.stream, self.unit = stream, unit

    def write(self, planes: Planes, pts: int) -> Any:
        """Encode a frame; it is handed back as FFmpeg has it."""
        height, width = planes[0].shape
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane, values in zip(frame.planes, planes, strict=True):
            rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
            rows[: plane.height, : plane.width] = values
        frame.pts, frame.time_base = pts, self.unit
        self.container.mux(self.stream.encode(frame))
        return frame

    def close(self) -> None:
        """End the piece and give it its name."""
        self.container.mux(self.stream.encode(None))
        self.container.close()
        self.partial.replace(self.path)


class Log:
    """Rows of a pass that makes no film, kept in pieces: what a folder holds already, and what is added to it.

    state: behind the last piece; empty where there is none.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.pieces = folder, finished(folder, filmed=False)
        self.state = self.pieces[-1].state if self.pieces else {}
        self.lines: list[str] = []
        self.times: list[int] = []
        self.began_s: float | None = None

    @property
    def frames(self) -> int:
        """How many are in whole pieces."""
        return sum(len(piece.pts) for piece in self.pieces)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Of whole pieces."""
        for piece in self.pieces:
            yield from map(json.loads, read_text(lines_path(self.folder, piece.number)).splitlines())

    def add(self, seconds: float, pts: int, rows: Sequence[dict[str, Any]]) -> bool:
        """Take the rows of a frame. Whether its ten seconds are over, so that a piece may end."""
        self.began_s = seconds if self.began_s is None else self.began_s
        self.times.append(pts)
        self.lines += [json.dumps(row, ensure_ascii=False) for row in rows]
        return int(seconds / LENGTH_S) > int(self.began_s / LENGTH_S)

    def commit(self, state: dict[str, Any]) -> None:
        """End the piece; from here on it is not done again."""
        piece = Piece(len(self.pieces), tuple(self.times), state)
        commit(self.folder, piece, self.lines)
        self.pieces.append(piece)
        self.state, self.lines, self.times, self.began_s = state, [], [], None


def are_of(folder: Path, input_hash: str) -> bool:
    """Whether the pieces in a folder were made of this."""
    known = folder / INPUT
    return known.exists() and known.read_text() == input_hash


def begin(folder: Path, input_hash: str) -> None:
    """An empty folder for pieces of this, in place of those of something else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_atomically(folder / INPUT, input_hash)


def film_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.mp4"


def lines_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.jsonl"


def commit(folder: Path, piece: Piece, lines: Sequence[str]) -> None:
    """From here on the piece is not done again."""
    write_atomically(lines_path(folder, piece.number), "".join(f"{line}\n" for line in lines))
    write_atomically(folder / f"{piece.number:06d}.json", json.dumps(vars(piece)))


def finished(folder: Path, *, filmed: bool) -> list[Piece]:
    """The pieces that are whole, in their order, up to the first that is missing. filmed: they have films."""
    found: list[Piece] = []
    for path in sorted(folder.glob("*.json")):
        try:
            piece = from_plain(Piece, json.loads(read_text(path)))
        except UNREADABLE:
            break
        films = (film_path(folder, piece.number),) if filmed else ()
        if not all(file.exists() for file in (lines_path(folder, piece.number), *films)):
            break
        found.append(piece)
    return found


def join(folder: Path, pieces: Sequence[Piece], source: Path, unit: Fraction, end: int, target: Path) -> None:
    """One film of all pieces, with the source's sound as it is, its index in front. end: the pts behind the last frame.

    Raises RunError where a piece is gone or the disk is full.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        with (
            av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as out,
            av.open(str(source)) as sound,
        ):
            with av.open(str(film_path(folder, pieces[0].number))) as first:
                video: Any = out.add_stream_from_template(first.streams.video[0])
            video.time_base = unit
            audio = _audio(out, sound)
            packets = heapq.merge(
                _video_packets(folder, pieces, video, unit, end),
                _audio_packets(sound, audio),
                key=itemgetter(0),
            )
            for _, packet in packets:
                out.mux(packet)
        partial.replace(target)
    except (OSError, av.error.FFmpegError) as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"cannot write {target} ({error.strerror}); type the same command again") from error


def _audio(out: Any, sound: Any) -> dict[Any, Any]:
    """Stream of the source -> stream of the film, of those that MP4 can hold."""
    made = {}
    for stream in sound.streams.audio:
        name = stream.codec_context.name
        if name.startswith("pcm") or name not in out.supported_codecs:
            say(f"warning: the sound ({name}) is left out, MP4 can't hold it")
        else:
            made[stream] = out.add_stream_from_template(stream)
    return made


def _video_packets(
    folder: Path, pieces: Sequence[Piece], stream: Any, unit: Fraction, end: int
) -> Iterator[tuple[Fraction, Any]]:
    """Packets with the times of the source's frames: in a piece they count from its own first one."""
    times = [pts for piece in pieces for pts in piece.pts]
    upcoming = iter([*times[1:], end])
    for piece in pieces:
        with av.open(str(film_path(folder, piece.number))) as film:
            packets = (packet for packet in film.demux(film.streams.video[0]) if packet.size)
            for packet, pts in zip(packets, piece.pts, strict=True):
                packet.time_base, packet.stream = unit, stream
                packet.pts = packet.dts = pts
                packet.duration = max(1, next(upcoming) - pts)
                yield pts * unit, packet


def _audio_packets(sound: Any, made: dict[Any, Any]) -> Iterator[tuple[Fraction, Any]]:
    if not made:
        return
    with suppress(av.error.FFmpegError, EOFError):  # a file that is cut off
        for packet in sound.demux(*made):
            if packet.dts is not None:
                seconds = packet.dts * packet.time_base
                packet.stream = made[packet.stream]
                yield seconds, packet
