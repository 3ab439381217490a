"""Images out of a video: the sharp ones, none twice, each scene on one side; and crops of what is in them."""

import json
import shutil
import signal
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image, ImageFilter

from finetune.data.images import authors
from finetune.data.images import folder as image_folder
from finetune.data.images.split import for_validation
from finetune.errors import DataError, Interrupted, RunError
from finetune.run.signals import Stop
from finetune.video import extraction, measuring
from finetune.video.extraction import extract, split
from finetune.video.measuring import sharpness
from finetune.video.settings import Frames
from tests.unit.video.films import SIDE, SquareFinder, film, place, regular, scenes

SIZE = (160, 120)


def textured(scene: int) -> np.ndarray:
    rng = np.random.default_rng(scene)
    coarse = Image.fromarray(rng.integers(30, 220, (3, 4, 3)).astype(np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    fine = rng.integers(-25, 25, (SIZE[1], SIZE[0], 1))
    return np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)


def shots(number: int) -> np.ndarray:
    """Six shots of 20 frames. Each pans, but for the fourth, which stands still. Of ten frames seven are blurred."""
    shot, within = divmod(number, 20)
    picture = np.roll(textured(shot), 0 if shot == 3 else 3 * within, 1)
    if within % 10 < 7:
        picture = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(2)))
    return picture


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("film") / "film.mp4", regular(120), draw=shots, unit=Fraction(1, 12800))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def no_finder() -> Any:
    raise AssertionError("no detector is needed")


def test_images_are_sharp_unlike_one_another_and_split_by_scene(video: Path, tmp_path: Path) -> None:
    settings = Frames(video=str(video), folder="x", rate=Fraction(1), validation_share=0.3)
    made = extract(video, tmp_path / "images", settings, no_finder)
    found = rows(tmp_path / "images")
    assert made.scenes == 6
    assert made.images == len(found) == 11  # of the scene that stands still one, of the others two
    frames = [round(row["time_sec"] * 10) for row in found]
    assert all(frame % 10 >= 7 for frame in frames), frames
    assert Counter(row["scene"] for row in found) == {0: 2, 1: 2, 2: 2, 3: 1, 4: 2, 5: 2}
    sides = {row["scene"]: row["split"] for row in found}
    assert [row["split"] for row in found] == [sides[row["scene"]] for row in found]
    assert made.validation == sum(row["split"] == "validation" for row in found)
    assert 2 <= made.validation <= 5
    for row in found:
        picture = np.asarray(Image.open(tmp_path / "images" / row["file_name"])).astype(int)
        assert np.abs(picture - shots(round(row["time_sec"] * 10))).mean() < 12
        assert row["source"] == "film.mp4"


def test_a_folder_of_images_reads_the_split(video: Path, tmp_path: Path) -> None:
    extract(video, tmp_path / "images", Frames(video="x", folder="x"), no_finder)
    files = image_folder.images(tmp_path / "images")
    held_out = for_validation(tmp_path / "images", files, 0.2)
    assert held_out == {row["file_name"] for row in rows(tmp_path / "images") if row["split"] == "validation"}
    assert held_out
    captions = image_folder.captions(tmp_path / "images", files)
    assert captions.texts == {}
    assert captions.strays == ()


def test_the_most_are_shared_out_among_the_scenes(video: Path, tmp_path: Path) -> None:
    extract(video, tmp_path / "images", Frames(video="x", folder="x", rate=Fraction(1), most=6), no_finder)
    assert [row["scene"] for row in rows(tmp_path / "images")] == list(range(6))


def test_crops_show_the_object_with_a_margin(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", regular(40), unit=Fraction(1, 12800))
    settings = Frames(
        video="x",
        folder="x",
        crops=("square",),
        detector="embedded:detector",
        margin=0.25,
        least_px=16,
        difference=0.01,
        batch=3,
    )
    made = extract(path, tmp_path / "crops", settings, SquareFinder)
    assert made.images > 3
    for row in rows(tmp_path / "crops"):
        number = round(row["time_sec"] * 10)
        left = place(number)
        wanted = [max(0, left - 4), 16, left + SIDE + 4, 20 + SIDE + 4]
        assert row["bbox"] == pytest.approx(wanted, abs=2)
        assert row["class"] == "square"
        crop = np.asarray(Image.open(tmp_path / "crops" / row["file_name"])).astype(int)
        assert crop.shape[:2] == (row["bbox"][3] - row["bbox"][1], row["bbox"][2] - row["bbox"][0])
        middle = crop[crop.shape[0] // 2, crop.shape[1] // 2]
        assert middle[0] - middle[1] > 100


def test_a_folder_is_filled_again_and_somebody_elses_is_not_touched(video: Path, tmp_path: Path) -> None:
    settings = Frames(video="x", folder="x", most=3)
    extract(video, tmp_path / "images", settings, no_finder)
    extract(video, tmp_path / "images", Frames(video="x", folder="x", most=2), no_finder)
    assert len(rows(tmp_path / "images")) == len(list((tmp_path / "images").glob("*.jpg"))) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").touch()
    with pytest.raises(DataError, match="is there and holds something else; name a new folder: folder=DIR"):
        extract(video, tmp_path / "mine", settings, no_finder)
    (tmp_path / "images" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"is there and holds notes\.txt; name a new folder"):
        extract(video, tmp_path / "images", settings, no_finder)


def test_a_folder_that_is_filled_again_keeps_the_texts_of_its_images(video: Path, tmp_path: Path) -> None:
    folder, few = tmp_path / "images", Frames(video="x", folder="x", most=2)
    extract(video, folder, few, no_finder)
    first, second = rows(folder)
    lines = [first | {"text": "mine"}, second | {"text": "its", authors.MARK: authors.mark("its")}]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    extract(video, folder, replace(few, validation_share=0.0), no_finder)
    assert [(row["text"], row["split"]) for row in rows(folder)] == [("mine", "train"), ("its", "train")]
    assert rows(folder)[1][authors.MARK] == authors.mark("its")
    with pytest.raises(DataError, match=f"holds texts that would be lost, such as that of {first['file_name']}; name"):
        extract(video, folder, replace(few, most=1, sharpness=2.0, rate=Fraction(50)), no_finder)
    assert [row["text"] for row in rows(folder)] == ["mine", "its"]


def test_a_kill_while_the_folder_is_replaced_loses_no_text(video: Path, tmp_path: Path) -> None:
    folder, settings = tmp_path / "images", Frames(video="x", folder="x")
    extract(video, folder, settings, no_finder)
    lines = [row | {"text": f"mine {number}"} for number, row in enumerate(rows(folder))]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    folder.rename(tmp_path / ".images.old")
    (tmp_path / ".images.tmp").mkdir()
    extract(video, folder, settings, no_finder)
    assert [row["text"] for row in rows(folder)] == [line["text"] for line in lines]
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def cut_at(call: int, what: str, path: Path, folder: Path, settings: Frames) -> str:
    """Let a signal come in a call of `measuring.sharpness` or `extraction._save`; the line that is printed."""
    asked, left = Stop(), iter(range(call - 1, -1, -1))
    module = {"sharpness": measuring, "_save": extraction}[what]
    real = getattr(module, what)

    def meeting(*words: Any) -> Any:
        if next(left, 0) == 0:
            asked.number = signal.SIGTERM
        return real(*words)

    with mock.patch.object(module, what, meeting), pytest.raises(Interrupted) as stopped:
        extract(path, folder, settings, SquareFinder, asked)
    assert stopped.value.exit_code == 143
    assert not folder.exists()
    return str(stopped.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("crops", [(), ("square",)])
def test_a_cut_run_goes_on_and_the_folder_is_the_same_to_the_byte(tmp_path: Path, crops: tuple[str, ...]) -> None:
    """Cut twice while frames are measured and once while images are written, then killed within an image."""
    path = film(tmp_path / "film.mp4", regular(240), draw=scenes)
    settings = Frames(video="x", folder="x", crops=crops, detector="embedded:detector", difference=0, sharpness=0)
    settings = replace(settings, rate=Fraction(5), least_px=16, batch=3)
    extract(path, tmp_path / "whole", settings, SquareFinder)
    folder = tmp_path / "cut"
    cut_at(20, "sharpness", path, folder, settings)
    said = cut_at(130, "sharpness", path, folder, settings)
    assert said == "stopped by SIGTERM after 14.9 s of film.mp4 were measured; the same command goes on from there"
    said = cut_at(62, "_save", path, folder, settings)
    done = 63 if crops else 62  # whole batches
    assert (
        said == f"stopped by SIGTERM after {done} of 120 chosen frames of film.mp4; the same command goes on from there"
    )
    with mock.patch.object(extraction, "_save", half_saved), pytest.raises(ZeroDivisionError):
        extract(path, folder, settings, SquareFinder)
    finder = SquareFinder()
    extract(path, folder, settings, lambda: finder)
    assert contents(folder) == contents(tmp_path / "whole")
    assert finder.looked == (120 - done if crops else 0)
    assert {each.name for each in tmp_path.iterdir()} == {"film.mp4", "whole", "cut"}


def half_saved(folder: Path, name: str, *_: Any) -> Any:
    (folder / name).write_bytes(b"half an image")
    (folder / f"stray-{name}").touch()  # of a detector that found more
    raise ZeroDivisionError


def test_images_that_are_gone_are_written_again(video: Path, tmp_path: Path) -> None:
    settings = Frames(video="x", folder="x")
    extract(video, tmp_path / "whole", settings, no_finder)
    with mock.patch.object(extraction, "replace_folder", side_effect=MemoryError), pytest.raises(MemoryError):
        extract(video, tmp_path / "cut", settings, no_finder)
    shutil.rmtree(tmp_path / ".cut.frames" / "pieces" / "images")
    extract(video, tmp_path / "cut", settings, no_finder)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_with_other_settings_a_cut_run_begins_again(video: Path, tmp_path: Path) -> None:
    cut_at(60, "sharpness", video, tmp_path / "cut", Frames(video="x", folder="x", rate=Fraction(5)))
    settings = Frames(video="x", folder="x")
    for name in ("cut", "whole"):
        extract(video, tmp_path / name, settings, no_finder)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_folder_that_is_being_filled_or_can_t_be_written_is_named(video: Path, tmp_path: Path) -> None:
    (tmp_path / ".images.frames").mkdir()
    with (
        FileLock(tmp_path / ".images.frames" / ".lock"),
        pytest.raises(RunError, match="images is being filled by another command; wait for it, or name another folder"),
    ):
        extract(video, tmp_path / "images", Frames(video="x", folder="x"), no_finder)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*\.images\.frames \(.*\); free the disk or choose a folder"):
        extract(video, tmp_path / "file" / "images", Frames(video="x", folder="x"), no_finder)


def test_where_nothing_is_found_no_folder_is_left(tmp_path: Path) -> None:
    video = film(tmp_path / "film.mp4", regular(20))
    with pytest.raises(DataError, match="no square of 64 px was found; try a lower threshold or least_px"):
        extract(
            video,
            tmp_path / "crops",
            Frames(video="x", folder="x", crops=("square",), detector="embedded:detector"),
            SquareFinder,
        )
    assert [each.name for each in tmp_path.iterdir()] == ["film.mp4"]


def test_one_scene_holds_nothing_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = film(tmp_path / "film.mp4", regular(20), draw=lambda n: shots(n % 20), unit=Fraction(1, 12800))
    assert extract(path, tmp_path / "images", Frames(video="x", folder="x"), no_finder).validation == 0
    assert "warning: nothing is held out: all images are of one scene" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_scenes_are_never_torn_apart_and_the_share_is_near(share: float) -> None:
    made = [{"scene": scene} for scene in range(40) for _ in range(1 + scene % 5)]
    sides = split(made, share)
    held_out = sum(sides[row["scene"]] == "validation" for row in made)
    assert held_out / len(made) == pytest.approx(share, abs=0.04)
    assert "train" in sides.values()


def test_sharpness_falls_with_blur_and_not_with_light() -> None:
    grey = textured(1)[..., 0]
    blurred = [np.asarray(Image.fromarray(grey).filter(ImageFilter.GaussianBlur(radius))) for radius in (0.5, 1, 2, 4)]
    values = [sharpness(picture) for picture in (grey, *blurred)]
    assert values == sorted(values, reverse=True)
    dark = (grey * 0.4).astype(np.uint8)
    assert sharpness(dark) == pytest.approx(sharpness(grey), rel=0.2)


def test_a_folder_that_is_all_validation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "split": "validation"}\n')
    with pytest.raises(DataError, match='every image is marked "split": "validation"; leave some for training'):
        for_validation(tmp_path, ["a.png"], 0.2)
