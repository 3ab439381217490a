"""What the video commands are told: words over a recipe over defaults, and every wrong word answered."""

from fractions import Fraction
from pathlib import Path

import pytest

from finetune.config import recipes
from finetune.config.schema import Device
from finetune.errors import ConfigError
from finetune.video.settings import Annotate, Frames, as_plain, offered, parse


def test_words_are_read_by_their_type() -> None:
    words = [
        "video=a b.mp4",
        "rate=30000/1001",
        "classes=[car, boat]",
        "labelled=no",
        "device=cpu",
        "batch=4",
        "detector=d",
    ]
    settings = parse(Annotate, "annotate", [*words, "threshold=0.3", "exports=coco"])
    assert settings == Annotate(
        video="a b.mp4",
        detector="d",
        rate=Fraction(30000, 1001),
        classes=("car", "boat"),
        labelled=False,
        device=Device.cpu,
        batch=4,
        threshold=0.3,
        exports=("coco",),
    )
    assert as_plain(settings)["rate"] == "30000/1001"


def test_a_recipe_is_a_base_that_words_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "conf" / "video"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# Mine.\nvideo: film.mp4\ndetector: d\nrate: 2.5\nclasses: [car]\nlabelled: false\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = parse(Annotate, "annotate", ["rate=1", "conf=mine"])
    assert settings == Annotate(video="film.mp4", detector="d", rate=Fraction(1), classes=("car",), labelled=False)
    assert set(recipes.video_files()) == {"mine", "toy_video"}
    assert "mine" not in recipes.recipe_files()
    assert "video" not in recipes.preset_files()
    assert offered(Annotate, "conf=m") == ["conf=mine"]
    assert offered(Annotate, "ra") == ["rate="]


def test_every_recipe_that_ships_is_one() -> None:
    for name in recipes.video_files():
        assert parse(Annotate, "annotate", [f"conf={name}", "detector=d"]).video


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say which video: video=FILE, or folder=DIR for all in it, or conf=toy_video to try"),
        (["video=a", "folder=b"], "video=a and folder=b exclude each other; give one of them"),
        (["video=a"], "say which detector: detector=PekingU/rtdetr_v2_r18vd from the hub, the folder of one on "),
        (["video=film.mp4"], "say which detector: detector="),
        (["a.mp4"], "a.mp4 is no setting; type annotate KEY=VALUE, such as video=holiday.mp4"),
        ([__file__], f"{__file__} is no setting; type annotate KEY=VALUE, such as video={__file__}"),
        (["--fast"], "--fast is no setting"),
        (["video=a", "rat=5"], "no setting of annotate called 'rat'; did you mean rate?"),
        (["video=a", "rate=often"], "rate=often can't be read; expected a number above 0 and up to 1000"),
        (["video=a", "rate=0"], "rate=0 can't be read"),
        (["video=a", "rate=1/0"], "rate=1/0 can't be read"),
        (["video=a", "batch=2.5"], "batch=2.5 can't be read; expected a whole number"),
        (["video=a", "batch=0"], "batch must be from 1 to 1024, got 0"),
        (["video=a", "threshold=nan"], "threshold=nan can't be read; expected a number"),
        (["video=a", "threshold=2"], "threshold must be from 0 to 1, got 2.0"),
        (["video=a", "labelled=maybe"], "labelled=maybe can't be read; expected true or false"),
        (["video=a", "device=tpu"], "device=tpu can't be read; expected auto or"),
        (["video=a", "exports=voc"], "exports=voc is none of coco, yolo, cvat"),
        (["conf=gone"], "no video recipe called 'gone'; there are: toy_video"),
    ],
)
def test_a_wrong_word_is_answered(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Annotate, "annotate", words)
    assert str(caught.value).startswith(message) or message in str(caught.value)


def test_frames_say_what_is_missing() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Frames, "frames", [])
    assert str(caught.value).splitlines() == [
        "video= is missing, such as video=holiday.mp4",
        "folder= is missing, such as folder=datasets/holiday",
    ]
    with pytest.raises(ConfigError, match="say which detector: "):
        parse(Frames, "frames", ["video=a", "folder=b", "crops=[car]"])
    with pytest.raises(ConfigError, match=r"margin must be from 0 to 2, got 3\.0"):
        parse(Frames, "frames", ["video=a", "folder=b", "margin=3"])
    for folder in (".", "..", "/"):
        with pytest.raises(ConfigError, match="is replaced as a whole; give its name: folder=datasets/holiday"):
            parse(Frames, "frames", ["video=a", f"folder={folder}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "holds no `key: value` lines"), ("a: [\n", "is not readable YAML")],
)
def test_a_recipe_that_is_none_is_named(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "video").mkdir(parents=True)
    (tmp_path / "conf" / "video" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        parse(Annotate, "annotate", ["conf=mine"])
