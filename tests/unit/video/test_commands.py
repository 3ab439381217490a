"""The video commands as they are typed."""

import json
import pickle
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.data.images.folder import images
from finetune.errors import ConfigError, DataError, FinetuneError, Interrupted, ModelError, RunError
from finetune.run.signals import Stop
from finetune.video import annotate, extraction, measuring
from finetune.video.detector import Detector
from finetune.video.settings import Annotate
from finetune.video.tracks import iou
from tests.conftest import ROOT
from tests.unit.video.detectors import tiny_detector
from tests.unit.video.films import film, regular, scenes

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"detector={tiny_detector(tmp_path_factory.mktemp('detector'))}"


def test_the_toy_video_is_annotated_and_then_up_to_date(
    finetune_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("annotate", "conf=toy_video", "device=cpu")
    answer = finetune_cli(*words)
    assert answer.code == 0, answer.err
    assert "10 s, 50 looks, 3 scenes" in answer.out
    run = tmp_path / "outputs" / "toy_video"
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == {
        *("annotation.json", "annotations.jsonl", "labelled.mp4", "sheet.jpg", "report.html", "config.yaml"),
        *("coco.json", "cvat.xml", "data.yaml", "images", "labels"),
    }
    truths = json.loads((ROOT / "datasets" / "toy_video" / "boxes.json").read_text())
    looks = [json.loads(line)["objects"] for line in (run / "annotations.jsonl").read_text().splitlines()]
    right = sum(map(found_again, looks, truths))
    assert right >= 0.9 * sum(map(len, truths))  # some hide behind others, or leave the picture
    assert right >= 0.95 * sum(map(len, looks))
    again = finetune_cli(*words).out
    assert "toy_video.mp4: up to date, skipped" in again
    assert max(map(len, (answer.out + again).splitlines())) <= 80


def found_again(found: list[dict[str, Any]], truth: list[dict[str, Any]]) -> int:
    """The things of a look that were found: their class, in a box that overlaps theirs by half or more."""
    left = list(found)
    for thing in truth:
        for one in left:
            if one["class"] == thing["class"] and iou(one["bbox"], thing["bbox"]) >= 0.5:
                left.remove(one)
                break
    return len(found) - len(left)


def test_a_detector_that_is_not_there_leaves_no_folder(
    finetune_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = finetune_cli("annotate", "conf=toy_video", f"detector={tmp_path / 'gone'}")
    assert answer.code == ModelError.exit_code
    assert list(tmp_path.iterdir()) == []


def test_the_toy_video_is_small() -> None:
    assert (ROOT / "datasets" / "toy_video" / "toy_video.mp4").stat().st_size < 2**20


@pytest.mark.sampled
@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_is_annotated_and_one_bad_video_stops_no_other(
    finetune_cli: Cli, detector: str, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos" / "one.mp4", regular(10))
    (tmp_path / "videos" / "two.mp4").write_text("no video " * 99)
    film(tmp_path / "videos" / "three.mp4", regular(20))
    run = tmp_path / "run"
    answer = finetune_cli(
        "annotate", f"folder={tmp_path / 'videos'}", detector, "device=cpu", f"run_dir={run}", f"workers={workers}"
    )
    assert answer.code == DataError.exit_code
    assert "two.mp4 can't be read as a video" in answer.err
    assert "2 videos annotated, 1 failed" in answer.out
    assert sorted(path.parent.name for path in run.glob("*/report.html")) == ["one", "three"]


def test_ctrl_c_keeps_what_was_done_and_the_same_command_goes_on(
    finetune_cli: Cli, detector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "film.mp4", regular(40))
    words = ("annotate", f"video={path}", detector, "device=cpu", f"run_dir={tmp_path / 'run'}", "batch=5")
    with monkeypatch.context() as patched:
        patched.setattr(Detector, "find", after(Detector.find, 2, signal.SIGINT))
        answer = finetune_cli(*words)
    assert answer.code == 130
    assert answer.errors[-1] == "stopped by Ctrl-C after 1.8 s of film.mp4; the same command goes on from there"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    answer = finetune_cli(*words)
    assert answer.code == 0
    assert "annotate: 19 frames of film.mp4 are done already" in answer.err


def test_a_second_ctrl_c_acts_at_once(
    finetune_cli: Cli, detector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "film.mp4", regular(20))
    monkeypatch.setattr(Detector, "find", after(Detector.find, 1, signal.SIGINT, signal.SIGINT))
    answer = finetune_cli("annotate", f"video={path}", detector, "device=cpu", f"run_dir={tmp_path / 'run'}")
    assert answer.code == 130
    line = "stopped by Ctrl-C; the same command goes on behind the last piece of ten seconds"
    assert answer.errors[-1] == line


def after(find: Callable[..., Any], calls: int, *signals: int) -> Callable[..., Any]:
    """A detector in whose last call these signals come."""
    left = [calls]

    def found(*words: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            for number in signals:
                signal.raise_signal(number)
        return find(*words)

    return found


def test_frames_go_on_where_ctrl_c_or_sigterm_stopped_them(
    finetune_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "film.mp4", regular(40), draw=scenes)
    words = ("frames", f"video={path}", "rate=5", "difference=0", "sharpness=0")
    assert finetune_cli(*words, f"folder={tmp_path / 'whole'}").code == 0
    cut = (*words, f"folder={tmp_path / 'cut'}")
    for module, name, number, said in (
        (measuring, "sharpness", signal.SIGINT, "stopped by Ctrl-C after 0.6 s of film.mp4 were measured"),
        (measuring, "sharpness", signal.SIGTERM, "stopped by SIGTERM after 1.3 s of film.mp4 were measured"),
        (extraction, "_save", signal.SIGINT, "stopped by Ctrl-C after 7 of 20 chosen frames of film.mp4"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, after(getattr(module, name), 7, number))
            answer = finetune_cli(*cut)
        assert answer.code == 128 + number
        assert answer.errors[-1] == f"{said}; the same command goes on from there"
        assert not (tmp_path / "cut").exists()
    with monkeypatch.context() as patched:
        patched.setattr(extraction, "_save", after(extraction._save, 2, signal.SIGINT, signal.SIGINT))
        answer = finetune_cli(*cut)
    assert answer.code == 130
    line = "stopped by Ctrl-C; the same command goes on behind the last piece of ten seconds"
    assert answer.errors[-1] == line
    answer = finetune_cli(*cut)
    assert answer.code == 0
    assert "frames: 7 of 20 frames of film.mp4 are done already" in answer.err
    assert {each.name for each in tmp_path.iterdir()} == {"film.mp4", "whole", "cut"}
    for each in (tmp_path / "whole").iterdir():
        assert each.read_bytes() == (tmp_path / "cut" / each.name).read_bytes()


@pytest.mark.parametrize(
    ("number", "error", "line"),
    [
        (None, RunError, "a worker ended by itself (its last lines stand above), perhaps for lack of memory; "),
        (signal.SIGINT, Interrupted, "stopped by Ctrl-C; the same command goes on behind the last piece"),
    ],
)
def test_a_worker_that_ends_by_itself_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, error: type[FinetuneError], line: str
) -> None:
    monkeypatch.setattr(annotate, "_begin", sys.exit)
    asked = Stop()
    asked.number = number
    settings = Annotate(folder="videos", workers=2)
    jobs = [(tmp_path / name, tmp_path / "run", settings) for name in ("one", "two")]
    with pytest.raises(error, match=re.escape(line)):
        annotate._all(jobs, settings, asked)


def test_an_interruption_comes_whole_from_a_workers_process() -> None:
    error = pickle.loads(pickle.dumps(Interrupted("stopped by SIGTERM", 15)))
    assert (str(error), error.exit_code) == ("stopped by SIGTERM", 143)


def test_what_is_printed_of_frames_is_folded_but_for_the_command_to_type(
    finetune_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "a film.mp4", regular(20))
    monkeypatch.setenv("COLUMNS", "50")
    answer = finetune_cli("frames", f"video={path}", f"folder={tmp_path / 'my images'}")
    assert answer.code == 0, answer.err
    *lines, last = answer.out.splitlines()
    assert lines[-1] == "next"
    assert max(map(len, lines)) <= 50
    assert last == f"  finetune train conf=pixar_style 'data.folder={tmp_path}/my images' 'name=my images'"


@pytest.mark.exhaustive
def test_frames_fill_a_folder_that_is_trained_on(finetune_cli: Cli, tmp_path: Path) -> None:
    folder, run = tmp_path / "images", tmp_path / "run"
    video = ROOT / "datasets" / "toy_video" / "toy_video.mp4"
    answer = finetune_cli("frames", f"video={video}", f"folder={folder}", "rate=2", "validation_share=0.35")
    assert answer.code == 0, answer.err
    assert "3 scenes" in answer.out
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    held_out = {row["file_name"] for row in rows if row["split"] == "validation"}
    assert len(rows) == len(images(folder)) > 6
    assert 0 < len(held_out) < len(rows)
    settings = (f"data.folder={folder}", f"run_dir={run}", f"data.cache={tmp_path / 'cache'}", "hardware=cpu")
    answer = finetune_cli("train", "conf=smoke", *settings, "caption=embedded", "trainer.steps=1", "sample.prompts=[]")
    assert answer.code == 0, answer.err
    examples = [json.loads(line) for line in (run / "dataset.jsonl").read_text().splitlines()]
    assert {example["file"] for example in examples if example["held_out"]} == held_out
    after = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert all(row["text"] for row in after)
    assert [row["scene"] for row in after] == [row["scene"] for row in rows]


@pytest.mark.parametrize("command", ["annotate", "frames"])
def test_without_its_extra_a_command_says_what_to_install(
    finetune_cli: Cli, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    answer = finetune_cli(command, "video=film.mp4", "folder=x" if command == "frames" else "detector=x")
    assert answer.code == ConfigError.exit_code
    assert f"`finetune {command}` needs av; type: pip install 'finetune[video]'" in answer.err


def test_two_videos_of_one_name_have_a_folder_each(finetune_cli: Cli, detector: str, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos" / "one.mp4", regular(5))
    shutil.copy(tmp_path / "videos" / "one.mp4", tmp_path / "videos" / "one.mov")
    run = tmp_path / "run"
    answer = finetune_cli("annotate", f"folder={tmp_path / 'videos'}", detector, "device=cpu", f"run_dir={run}")
    assert answer.code == 0, answer.err
    assert sorted(path.parent.name for path in run.glob("*/report.html")) == ["one.mov", "one.mp4"]
