"""A video annotated: times, boxes, tracks and scenes against what was drawn; cut runs."""

import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from finetune.errors import DataError, Interrupted, RunError
from finetune.run import rundir
from finetune.run.signals import Stop
from finetune.video import page, pipeline, segments, writer
from finetune.video.annotation import annotate
from finetune.video.records import Annotated
from finetune.video.settings import Annotate
from finetune.video.source import opened
from tests.unit.video.films import (
    FRAMES,
    SIDE,
    SIZE,
    SquareFinder,
    film,
    frames,
    lines,
    odd_scenes,
    place,
    regular,
    square,
)


def test_every_look_says_what_was_drawn(done: tuple[Path, Annotated], long_film: Path) -> None:
    rows = lines(done[0])
    assert [row["frame_id"] for row in rows] == list(range(125))
    assert [row["timestamp_sec"] for row in rows] == [k / 5 for k in range(125)]
    assert [row["source_frame"] for row in rows] == [2 * k for k in range(125)]
    for row in rows:
        (one,) = row["objects"]
        left = place(row["source_frame"])
        assert one["class"] == "square"
        assert one["bbox"] == pytest.approx([left, 20, left + SIDE, 20 + SIDE], abs=1.5)
        assert (row["width"], row["height"], row["threshold"]) == (SIZE[0] - 1, SIZE[1] - 1, 0.5)
        assert row["source"] == "film.mp4"
        assert len(row["sha256"]) == 64


def test_tracks_and_scenes_follow_the_shots(done: tuple[Path, Annotated]) -> None:
    folder, record = done
    rows = lines(folder)
    assert [row["scene"] for row in rows] == [row["source_frame"] // 20 for row in rows]
    assert record.scenes == tuple(2.0 * shot for shot in range(13))
    tracks: dict[int, set[int]] = {}
    for row in rows:
        tracks.setdefault(row["scene"], set()).add(row["objects"][0]["track"])
    # The square begins again at the left edge: where that is within a shot it is another one.
    again = {number // 20 for number in range(1, FRAMES) if place(number) < place(number - 1) and number % 20}
    assert {scene for scene, numbers in tracks.items() if len(numbers) > 1} == again
    assert sum(map(len, tracks.values())) == len(set.union(*tracks.values())) == record.counts["square"]


def test_the_labelled_film_has_the_times_and_the_sound_of_the_source(
    done: tuple[Path, Annotated], long_film: Path
) -> None:
    path = done[0] / "labelled.mp4"
    source, labelled = frames(long_film), frames(path)
    assert [time for time, _ in labelled] == [time for time, _ in source]
    with av.open(str(path)) as container, av.open(str(long_film)) as before:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == SIZE
        sounds = [
            [(float(packet.pts * packet.time_base), bytes(packet)) for packet in each.demux(audio=0) if packet.size]
            for each in (container, before)
        ]
    assert sounds[0] == sounds[1]
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")


def test_boxes_are_drawn_where_the_objects_are_in_every_frame(done: tuple[Path, Annotated]) -> None:
    """Between two looks as well: along the box's left edge the frame differs from the source, inside it doesn't."""
    labelled = frames(done[0] / "labelled.mp4")
    for number in (4, 5, 6, 7, 150, 151):
        picture, plain, left = labelled[number][1].astype(int), odd_scenes(number).astype(int), place(number)
        inside = picture[26:32, left + 4 : left + 10]
        assert np.abs(inside - plain[26:32, left + 4 : left + 10]).mean() < 25
        edge = picture[24:34, left - 1 : left + 3]
        assert np.abs(edge - plain[24:34, left - 1 : left + 3]).mean() > 30, number


@pytest.mark.parametrize(
    ("most_held", "expected"),
    [
        (writer.MOST_HELD_BYTES, [4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24]),
        (2 * SIZE[0] * SIZE[1] * 3 // 2, [4, 4, 4, 7.3, 10.7, 14, 16, 18, 20, 22, 24]),
    ],
)
def test_a_box_glides_from_its_first_look_to_the_next(
    settings: Annotate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_held: int, expected: list[float]
) -> None:
    """At two looks a second, five frames apart. Where memory holds two frames only, the last ones catch up."""
    monkeypatch.setattr(writer, "MOST_HELD_BYTES", most_held)
    path = film(tmp_path / "film.mp4", regular(11))
    annotate(path, tmp_path / "run", replace(settings, rate=Fraction(2), images=False), SquareFinder)
    lefts = [left_edge(picture) for _, picture in frames(tmp_path / "run" / "labelled.mp4")]
    assert lefts == pytest.approx(expected, abs=1.5)


def left_edge(picture: np.ndarray) -> int:
    """Of the box around the square, which is drawn in blue."""
    picture = picture.astype(int)
    return int((picture[28:34, :, 2] - picture[28:34, :, 0] > 60).all(0).argmax())


def test_a_run_cut_anywhere_goes_on_without_a_frame_lost_or_done_twice(
    done: tuple[Path, Annotated], long_film: Path, settings: Annotate, tmp_path: Path
) -> None:
    folder = tmp_path / "film"
    for pieces in range(3):
        with pytest.raises(InterruptedError):
            annotate(long_film, folder, settings, partial(Cut, 45 * (pieces + 1) - 40 * pieces))
    for piece in sorted((folder / "pieces").glob("*.mp4")):
        assert len(frames(piece)) == 100
    finder = SquareFinder()
    record, new = annotate(long_film, folder, settings, lambda: finder)
    assert new
    assert 0 < finder.looked < 125
    assert (folder / "annotations.jsonl").read_bytes() == (done[0] / "annotations.jsonl").read_bytes()
    assert replace(record, per_second={}) == replace(done[1], per_second={})
    for one, other in zip(frames(folder / "labelled.mp4"), frames(done[0] / "labelled.mp4"), strict=True):
        assert one[0] == other[0]
        # With AVX-512, x264 now and then encodes the same frames otherwise (seen on an AMD EPYC; never with AVX2).
        assert np.abs(one[1].astype(int) - other[1]).mean() < 1


class Cut(SquareFinder):
    """Ends in the middle."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    def find(self, frames: Any, width: int, height: int) -> Any:
        self.left -= len(frames)
        if self.left < 0:
            raise InterruptedError
        return super().find(frames, width, height)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_every_look_that_was_done(
    done: tuple[Path, Annotated], long_film: Path, settings: Annotate, tmp_path: Path, number: int
) -> None:
    """No look is done twice, and all is as if nothing had happened."""
    folder, looked = tmp_path / "film", 0
    for after in (1, 40, 50):
        asked = Stop()
        finder = Asks(asked, number, after=after)
        with pytest.raises(Interrupted) as stopped:
            annotate(long_film, folder, settings, lambda one=finder: one, asked)
        assert stopped.value.exit_code == 128 + number
        reason = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        said = re.fullmatch(
            rf"stopped by {reason} after (\d+\.\d) s of film\.mp4; the same command goes on from there",
            str(stopped.value),
        )
        assert said
        looked += finder.looked
        assert float(said[1]) == pytest.approx((looked - 1) / 5)
    finder = SquareFinder()
    record, _ = annotate(long_film, folder, settings, lambda: finder)
    assert looked + finder.looked == 125
    assert (folder / "annotations.jsonl").read_bytes() == (done[0] / "annotations.jsonl").read_bytes()
    assert replace(record, per_second={}) == replace(done[1], per_second={})
    for one, other in zip(frames(folder / "labelled.mp4"), frames(done[0] / "labelled.mp4"), strict=True):
        assert one[0] == other[0]
        assert np.abs(one[1].astype(int) - other[1]).mean() < 2  # a film that begins anew is encoded otherwise


class Asks(SquareFinder):
    """Asks for the end, as a signal does, after so many looks."""

    def __init__(self, asked: Stop, number: int, *, after: int) -> None:
        super().__init__()
        self.asked, self.number, self.after = asked, number, after

    def find(self, frames: Any, width: int, height: int) -> Any:
        found = super().find(frames, width, height)
        if self.looked >= self.after:
            self.asked.number = self.number
        return found


def test_a_signal_before_anything_is_looked_at_leaves_nothing_half_done(
    long_film: Path, settings: Annotate, tmp_path: Path
) -> None:
    asked = Stop()
    asked.number = signal.SIGINT
    with pytest.raises(Interrupted, match=r"^stopped by Ctrl-C before film\.mp4; the same command goes on from there$"):
        annotate(long_film, tmp_path / "film", settings, SquareFinder, asked)

    def load() -> SquareFinder:
        late.number = signal.SIGINT
        return SquareFinder()

    late = Stop()
    line = r"^stopped by Ctrl-C before the first look at film\.mp4; the same command begins again$"
    with pytest.raises(Interrupted, match=line):
        annotate(long_film, tmp_path / "film", settings, load, late)
    assert {path.name for path in (tmp_path / "film" / "pieces").iterdir()} == {"input"}


def test_a_killed_film_plays_as_far_as_it_was_written(long_film: Path, settings: Annotate, tmp_path: Path) -> None:
    """SIGKILL, which nothing can answer, in the middle of the second piece."""
    code = f"""
import os, signal
from pathlib import Path
from finetune.video import segments
from finetune.video.annotation import annotate
from finetune.video.settings import Annotate
from tests.unit.video.films import SquareFinder
write, count = segments.Film.write, [0]
def dies(*words):
    count[0] += 1
    if count[0] == 160:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*words)
segments.Film.write = dies
settings = Annotate(video={settings.video!r}, detector={settings.detector!r})
annotate(Path({str(long_film)!r}), Path({str(tmp_path / "film")!r}), settings, SquareFinder)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False)
    assert ended.returncode == -9
    pieces = tmp_path / "film" / "pieces"
    assert [piece.number for piece in segments.finished(pieces, filmed=True)] == [0]
    assert len(frames(pieces / "000000.mp4")) == 100
    finder = SquareFinder()
    record, _ = annotate(long_film, tmp_path / "film", replace(settings, images=False), lambda: finder)
    assert record.frames == FRAMES
    assert [row["frame_id"] for row in lines(tmp_path / "film")] == list(range(125))


def test_what_is_done_is_not_done_again_and_other_settings_are(
    done: tuple[Path, Annotated], long_film: Path, settings: Annotate, tmp_path: Path
) -> None:
    folder = tmp_path / "film"
    shutil.copytree(done[0], folder)
    finder = SquareFinder()
    assert annotate(long_film, folder, replace(settings, batch=5), lambda: finder) == (done[1], False)
    assert finder.looked == 0
    record, new = annotate(long_film, folder, replace(settings, rate=Fraction(1), labelled=False), lambda: finder)
    assert new
    assert (finder.looked, record.looks) == (25, 25)
    kept = {"annotation.json", "annotations.jsonl", "report.html", "config.yaml", "coco.json"}
    annotate(long_film, folder, replace(settings, labelled=False, images=False, exports=("coco",)), lambda: finder)
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == kept
    (folder / "coco.json").unlink()
    assert annotate(
        long_film, folder, replace(settings, labelled=False, images=False, exports=("coco",)), lambda: finder
    )[1]
    assert (folder / "coco.json").is_file()


def test_the_folder_of_another_video_or_of_a_training_is_left_alone(
    done: tuple[Path, Annotated], settings: Annotate, tmp_path: Path
) -> None:
    other = film(tmp_path / "other.mp4", regular(5))
    with pytest.raises(RunError, match=r"holds the annotation of film\.mp4; name another folder: name=NAME or run_dir"):
        annotate(other, done[0], replace(settings, video=str(other)), SquareFinder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {}\nrun_dir: run\n")
    with pytest.raises(RunError, match=r"run holds what another command made \(train, or annotate\); choose another"):
        annotate(other, tmp_path / "run", replace(settings, video=str(other)), SquareFinder)
    with pytest.raises(RunError, match="holds what another command made"), rundir.held(done[0], {"model": {}}):
        pass


def test_looks_that_repeat_frames_are_named(
    settings: Annotate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = film(tmp_path / "film.mp4", regular(10))
    record, _ = annotate(path, tmp_path / "run", replace(settings, rate=Fraction(20)), SquareFinder)
    assert record.looks == 20
    said = "warning: rate=20 is more than film.mp4's 10 frames a second: looks repeat frames"
    assert said in capsys.readouterr().err


@pytest.mark.exhaustive
def test_thousands_of_frames_of_one_colour_are_one_scene_without_objects(settings: Annotate, tmp_path: Path) -> None:
    grey = np.full((32, 32, 3), 90, np.uint8)
    count = 3000
    path = film(tmp_path / "grey.mkv", regular(count), draw=lambda _: grey, options={"preset": "ultrafast"})
    few = replace(settings, images=False, rate=Fraction(1, 10))
    record, _ = annotate(path, tmp_path / "run", few, SquareFinder)
    assert (record.frames, record.objects, len(record.scenes), record.looks) == (count, 0, 1, 30)
    assert "Found: nothing with a score of 0.5 or more." in (tmp_path / "run" / "report.html").read_text()


def test_a_contact_sheet_holds_so_many_frames_and_no_more(tmp_path: Path) -> None:
    thumbnails = [tmp_path / f"{number:03d}.jpg" for number in range(130)]
    for path in thumbnails:
        Image.new("RGB", (32, 18)).save(path)
    target = page.sheet(thumbnails, tmp_path / "sheet.jpg")
    assert target is not None
    with Image.open(target) as sheet:
        assert sheet.size == (6 * 36 - 4, 8 * 22 - 4)  # every third


def test_a_film_without_its_end_is_said_to_be_damaged(settings: Annotate, tmp_path: Path) -> None:
    path = film(tmp_path / "film.mkv", regular(60))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    record, _ = annotate(path, tmp_path / "run", settings, SquareFinder)
    assert record.damage == f"it ends after {record.seconds:.1f} of the 6.0 s that it claims"
    assert f"The file is damaged: {record.damage}." in (tmp_path / "run" / "report.html").read_text()


def test_damaged_packets_are_counted_once_however_often_the_run_is_stopped(settings: Annotate, tmp_path: Path) -> None:
    path = film(tmp_path / "film.mov", regular(60), codec="png", pix_fmt="rgb24")
    data = bytearray(path.read_bytes())
    images = [found.start() for found in re.finditer(rb"\x89PNG", data)]
    for number in (8, 9, 45):
        data[images[number] : images[number] + 16] = bytes(16)
    path.write_bytes(data)
    for after in (4, 6):  # looks, of which each is two frames on
        asked = Stop()
        finder = Asks(asked, signal.SIGINT, after=after)
        with pytest.raises(Interrupted):
            annotate(path, tmp_path / "run", settings, lambda one=finder: one, asked)
    record, _ = annotate(path, tmp_path / "run", settings, SquareFinder)
    assert (record.frames, record.damage) == (57, "3 packets left out")
    whole, _ = annotate(path, tmp_path / "whole", settings, SquareFinder)
    assert whole.damage == record.damage


def test_a_damaged_film_is_annotated_as_far_as_it_goes(settings: Annotate, tmp_path: Path) -> None:
    path = film(tmp_path / "film.ts", regular(60), unit=Fraction(1, 90000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    record, _ = annotate(path, tmp_path / "run", settings, SquareFinder)
    assert 20 < record.frames < 60
    assert len(frames(tmp_path / "run" / "labelled.mp4")) == record.frames


def test_what_is_no_video_leaves_no_folder(settings: Annotate, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(DataError):
        annotate(tmp_path / "empty.mp4", tmp_path / "run", settings, SquareFinder)
    assert not (tmp_path / "run").exists()


def test_a_failure_of_a_thread_ends_the_run(
    long_film: Path, settings: Annotate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(segments, "commit", full)
    with pytest.raises(RunError, match="the disk is full"):
        annotate(long_film, tmp_path / "run", settings, SquareFinder)


def test_what_waits_between_threads_is_bounded(tmp_path: Path) -> None:
    """Of a film only a few frames are in memory at any time."""
    most = [0]
    path = film(tmp_path / "film.mkv", regular(400), draw=square)
    put = pipeline._put

    def counted_put(queue: Any, item: Any, stop: Any) -> None:
        put(queue, item, stop)
        most[0] = max(most[0], queue.qsize())

    with opened(path) as source, pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "_put", counted_put)
        work = pipeline.Work(source, SquareFinder(), tmp_path, Fraction(5), 8, True, None, {})
        pipeline.run(work, [], Silent(), Stop())
    assert 0 < most[0] <= pipeline.MOST_WAITING


class Silent:
    def advance(self, amount: int = 1, text: str = "") -> None: ...
