"""Videos as they are: frames upright with exact times, whatever the file is like; and what is no video, said."""

import random
from collections.abc import Callable
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from finetune.errors import DataError
from finetune.video.pipeline import shown_when
from finetune.video.source import opened, planes, rgb, videos_in
from tests.unit.video.films import SIDE, SIZE, SquareFinder, film, place, regular, square


def uneven(count: int, seed: int = 3) -> list[Fraction]:
    """Times as a phone has them: frames a 30th to a second apart, in milliseconds."""
    rng = random.Random(seed)
    times = [Fraction(0)]
    for _ in range(count - 1):
        times.append(times[-1] + Fraction(rng.choice((33, 40, 50, 120, 400, 1000)), 1000))
    return times


def seen(path: Path) -> list[tuple[Fraction, np.ndarray]]:
    """Every frame's time, and the frame as a screen shows it."""
    with opened(path) as source:
        facts = source.facts
        return [
            (frame.pts * facts.unit, rgb(frame.picture, facts, facts.width, facts.height)) for frame in source.frames()
        ]


def left_edge(frame: np.ndarray) -> float:
    (found,) = SquareFinder().find([frame], *SIZE)[0]
    return found.box[0]


@pytest.mark.parametrize("rate", [Fraction(5), Fraction(1, 3), Fraction(30000, 1001), Fraction(97)])
@pytest.mark.parametrize("times", [regular(40), uneven(40)], ids=["regular", "uneven"])
def test_a_look_sees_the_last_frame_that_is_not_later(tmp_path: Path, times: list[Fraction], rate: Fraction) -> None:
    with opened(film(tmp_path / "film.mkv", times)) as source:
        looks = [
            (look, frame.pts * source.facts.unit)
            for frame, numbers in shown_when(source.frames(), rate, 0, Fraction(1, 10))
            for look in numbers
        ]
    end = times[-1] + Fraction(1, 10)
    wanted = [(look, max(time for time in times if time <= look / rate)) for look in range(floor(end * rate) + 1)]
    assert looks == [(look, time) for look, time in wanted if look / rate < end]


def test_the_frame_is_the_one_of_its_time(tmp_path: Path) -> None:
    times = uneven(30)
    found = seen(film(tmp_path / "film.mkv", times))
    assert [time for time, _ in found] == times
    assert [left_edge(frame) for _, frame in found] == pytest.approx([place(n) for n in range(30)], abs=2)


@pytest.mark.parametrize("ending", [".mp4", ".ts", ".mkv"])
def test_a_film_that_does_not_start_at_zero_keeps_its_times(tmp_path: Path, ending: str) -> None:
    times = [Fraction(7) + time for time in regular(20)]
    path = film(tmp_path / f"film{ending}", times, unit=Fraction(1, 90000))
    with opened(path) as source:
        frames = list(source.frames())
    assert [frame.seconds for frame in frames] == pytest.approx(regular(20), abs=1e-3)
    assert float(frames[0].pts * source.facts.unit) >= 7  # FFmpeg begins a transport stream later still


@pytest.mark.parametrize(("turned", "turns"), [(90, 1), (180, 2), (-90, 3), (270, 3)])
def test_a_turned_film_is_shown_upright(tmp_path: Path, turned: int, turns: int) -> None:
    path = film(tmp_path / "film.mp4", regular(5), turned_deg=turned)
    with opened(path) as source:
        facts, frames = source.facts, list(source.frames())
        shown = rgb(frames[2].picture, facts, facts.width, facts.height)
        luma = planes(frames[2].picture, facts, facts.width, facts.height)[0]
    upright = np.rot90(square(2), turns)
    assert (facts.height, facts.width) == upright.shape[:2] == luma.shape
    assert np.abs(shown.astype(int) - upright).mean() < 6
    grey = np.asarray(Image.fromarray(np.ascontiguousarray(upright)).convert("L"))
    assert np.abs(luma.astype(int) - (16 + grey.astype(float) * 219 / 255)).mean() < 6


@pytest.mark.parametrize(("shape", "size"), [(Fraction(2), (192, 64)), (Fraction(1, 2), (96, 128))])
def test_pixels_that_are_not_square_are_shown_square(tmp_path: Path, shape: Fraction, size: tuple[int, int]) -> None:
    with opened(film(tmp_path / "film.mkv", regular(3), shape=shape)) as source:
        assert (source.facts.width, source.facts.height) == size


@pytest.mark.parametrize(
    "kind",
    [
        {"pix_fmt": "yuv420p10le"},
        {"pix_fmt": "yuv422p10le"},
        {"pix_fmt": "yuv444p"},
        {"codec": "ffv1", "pix_fmt": "bgr0", "options": {}},
        {"codec": "mpeg4"},
        {"options": {"bf": "3", "b-pyramid": "strict"}},
    ],
    ids=str,
)
def test_other_codings_show_the_same(tmp_path: Path, kind: dict[str, Any]) -> None:
    found = seen(film(tmp_path / "film.mkv", regular(12), **kind))
    assert [time for time, _ in found] == regular(12)
    for number, (_, frame) in enumerate(found):
        assert np.abs(frame.astype(int) - square(number)).mean() < 8


def combed(number: int) -> np.ndarray:
    """Two half pictures, a twentieth of a second apart: the square's even and odd lines are at different places."""
    whole = square(2 * number)
    whole[1::2] = square(2 * number + 5)[1::2]
    return whole


def test_interlaced_frames_are_made_whole(tmp_path: Path) -> None:
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
    path = film(tmp_path / "film.mkv", regular(10), draw=combed, options=options)
    with opened(path) as source:
        assert next(source.frames()).picture.width == SIZE[0]
    found = seen(path)
    assert [time for time, _ in found] == regular(10)
    edges = [np.abs(np.diff(frame[20 : 20 + SIDE, :, 0].astype(int), axis=0)).mean() for _, frame in found[2:8]]
    combs = [np.abs(np.diff(combed(n)[20 : 20 + SIDE, :, 0].astype(int), axis=0)).mean() for n in range(2, 8)]
    assert max(edges) < min(combs) / 2


@pytest.mark.parametrize("ending", [".mkv", ".ts"])
def test_a_file_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path: Path, ending: str) -> None:
    whole = film(tmp_path / f"whole{ending}", regular(60), draw=noise)
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    found = [time for time, _ in seen(cut)]
    assert 25 < len(found) < 50
    assert [time - found[0] for time in found] == pytest.approx(regular(len(found)), abs=1e-3)


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (64, 96, 3)).astype(np.uint8)


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("after", [0, 9, 10, 34])
def test_going_on_behind_a_frame_skips_none_and_repeats_none(tmp_path: Path, ending: str, after: int) -> None:
    path = film(tmp_path / f"film{ending}", regular(40), unit=Fraction(1, 90000))
    with opened(path) as source:
        whole = list(source.frames())
    with opened(path) as source:
        rest = list(source.frames(start=whole[0].pts, after=whole[after].pts))
    assert [(frame.pts, frame.seconds) for frame in rest] == [(f.pts, f.seconds) for f in whole[after + 1 :]]


def sound_only(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=48000)
        wave = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate = 48000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def subtitles(path: Path) -> None:
    path.write_text("1\n00:00:00,000 --> 00:00:02,000\nHello.\n", encoding="utf-8")


def picture(path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(path)


def tiny(path: Path) -> None:
    film(path, regular(2), codec="ffv1", pix_fmt="bgr0", draw=lambda _: np.zeros((1, 1, 3), np.uint8), options={})


def headless(path: Path) -> None:
    """An MP4 whose index, at its end, is missing."""
    film(path, regular(20))
    path.write_bytes(path.read_bytes()[:-2000])


def empty_film(path: Path) -> None:
    """Frames whose bytes say nothing."""
    film(path, regular(20), codec="mjpeg", pix_fmt="yuvj420p", options={})
    data = bytearray(path.read_bytes())
    for found in range(len(data) - 1):
        if data[found : found + 2] == b"\xff\xd8":
            data[found : found + 600] = bytes(600)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("sound.m4a", sound_only, "has no video stream, only audio"),
        ("words.srt", subtitles, "has no video stream, only subtitle"),
        ("still.png", picture, "is a still picture, not a video; images go into a folder: data.folder=DIR"),
        ("still.jpg", picture, "is a still picture"),
        ("dot.mkv", tiny, "is 1×1 pixels; at least 16×16 are needed"),
        ("empty.mp4", lambda path: path.write_bytes(b""), "is empty"),
        ("text.mp4", lambda path: path.write_text("a text " * 999), "can't be read as a video"),
        ("cut.mp4", headless, "can't be read as a video (Invalid data found when processing input); is it whole?"),
        ("gone.mp4", lambda path: None, "there is no video"),
        ("folder", lambda path: path.mkdir(), "is a folder; name a file of it: video=FILE"),
        ("zeros.mkv", empty_film, "is damaged"),
    ],
)
def test_what_is_no_video_is_named(tmp_path: Path, name: str, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError) as caught, opened(tmp_path / name):
        pass
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_videos_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no video; read are \.mp4"):
        videos_in(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        videos_in(tmp_path / "gone")
