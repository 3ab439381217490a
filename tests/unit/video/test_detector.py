"""Detectors as they are released: what they are given is what their own processor gives, and what is wrong is said."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from finetune import hub
from finetune.errors import ModelError
from finetune.video.detector import Detector, without_doubles
from finetune.video.tracks import Detection
from tests.unit.video.detectors import FAMILIES, tiny_detector

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_detector(tmp_path_factory.mktemp("detector"))


def loaded(folder: Path, *classes: str, threshold: float = 0.0) -> Detector:
    return Detector(str(folder), CPU, torch.float32, threshold=threshold, classes=classes)


def frame(width: int = 128, height: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_pixels_are_those_of_the_models_own_processor(folder: Path) -> None:
    detector = loaded(folder)
    assert detector.reads(1920, 1080) == (128, 96)
    wanted = detector.processor(images=Image.fromarray(frame()), return_tensors="pt").pixel_values
    torch.testing.assert_close(detector.pixels([frame()]), wanted)
    detector.processor.do_normalize = True
    wanted = detector.processor(images=Image.fromarray(frame()), return_tensors="pt").pixel_values
    torch.testing.assert_close(detector.pixels([frame()]), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("frame_size", "wanted"), [((1920, 1080), (1333, 750)), ((640, 480), (1067, 800)), ((1080, 1920), (750, 1333))]
)
def test_edges_are_those_that_detr_asks_for(folder: Path, frame_size: tuple[int, int], wanted: tuple[int, int]) -> None:
    detector = loaded(folder)
    detector.processor.size = {"shortest_edge": 800, "longest_edge": 1333}
    detector.multiple = 1  # DETR's own feature map is one
    assert detector.reads(*frame_size) == wanted
    detector.processor.size = {"max_height": 800}
    with pytest.raises(ModelError, match=r"its image processor's size .* is not known here"):
        detector.reads(640, 480)


@pytest.mark.sampled
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ({"shortest_edge": 90, "longest_edge": 150}, (150, 84)),
        ({"shortest_edge": 90}, (160, 90)),
        ({"longest_edge": 128}, (128, 72)),
        ({"height": 90, "width": 130}, (130, 90)),
    ],
)
def test_any_size_that_files_ask_for_works(
    tmp_path: Path, family: str, size: dict[str, int], wanted: tuple[int, int]
) -> None:
    """Or the nearest one that the strides of the model's feature maps divide."""
    detector = loaded(tiny_detector(tmp_path, family, size=size))
    width, height = detector.reads(320, 180)
    reach = 0 if family == "detr" else 16
    assert (width, height) == pytest.approx(wanted, abs=reach)
    detector.find([frame(width, height)] * 2, 320, 180)


@pytest.mark.sampled
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_size_may_be_missing_and_queries_few(tmp_path: Path, family: str) -> None:
    """Without names classes have numbers, without a size frames have the family's; one query finds one thing."""
    detector = loaded(tiny_detector(tmp_path, family, names=None, size=None, queries=1))
    assert detector.reads(320, 180) == ((1333, 750) if family == "detr" else (640, 640))
    assert all(name.startswith("LABEL_") for name in detector.names.values())
    found = detector.find([frame()] * 2, 320, 180)
    assert all(len(each) <= 1 for each in found)


@pytest.mark.sampled
@pytest.mark.parametrize("family", FAMILIES)
def test_files_that_do_not_say_enough_are_refused_in_one_line(tmp_path: Path, family: str) -> None:
    tiny_detector(tmp_path, family, names={1: "cat", 2: "car"})
    said = r"config\.json calls class 2 car, but classes are 0 to 1; number id2label from 0$"
    with pytest.raises(ModelError, match=said):
        loaded(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(
        ModelError, match=r"holds no preprocessor_config\.json, which says how frames are resized; copy"
    ):
        loaded(tmp_path)


COMMIT = "c0ffee" * 6


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of someone/tiny in the hub's cache; the hub answers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_ask_hub", lambda source: COMMIT)
    model = tmp_path / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "snapshots" / COMMIT).mkdir(parents=True)
    return model / "snapshots" / COMMIT


def test_what_is_missing_of_a_detector_of_the_hub_is_downloaded(
    folder: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.json is here, since its family was asked for; that is no reason to expect the other files here too."""
    shutil.copy(folder / "config.json", snapshot)
    downloaded: list[str] = []
    attempt = hub._attempt

    def download(loader: Any, reference: str, source: Path | str, options: dict[str, Any]) -> Any:
        if isinstance(source, str):
            name = "preprocessor_config.json" if "Processor" in loader.__name__ else "model.safetensors"
            downloaded.append(name)
            shutil.copy(folder / name, snapshot)
        return attempt(loader, reference, snapshot, {key: options[key] for key in options.keys() - {"revision"}})

    monkeypatch.setattr(hub, "_attempt", download)
    Detector("someone/tiny", CPU, torch.float32, threshold=0.0, classes=())
    assert downloaded == ["preprocessor_config.json", "model.safetensors"]


def test_a_detector_of_the_hub_without_its_processor_is_refused_in_one_line(
    folder: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("Can't load image processor for 'someone/tiny'. If you were trying to load it from …")

    shutil.copy(folder / "config.json", snapshot)
    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"someone/tiny can't be loaded as AutoImageProcessor: Can't load"):
        Detector("someone/tiny", CPU, torch.float32, threshold=0.0, classes=())  # why, nobody knows
    missing = snapshot.parent.parent / ".no_exist" / COMMIT
    missing.mkdir(parents=True)
    for name in hub.PROCESSOR_FILES:
        (missing / name).touch()
    with pytest.raises(
        ModelError, match=r"^someone/tiny holds no preprocessor_config\.json, which says how frames are"
    ):
        Detector("someone/tiny", CPU, torch.float32, threshold=0.0, classes=())


def test_boxes_are_in_pixels_of_the_frame_and_of_the_classes_that_are_wanted(folder: Path) -> None:
    detector = loaded(folder)
    frames = [frame(), np.zeros_like(frame())]
    found = [one for each in detector.find(frames, 1920, 1080) for one in each]
    raw = detector.processor.post_process_object_detection(
        detector.model(pixel_values=detector.pixels(frames)), threshold=0.0, target_sizes=[(1080, 1920)] * 2
    )
    names = [detector.names.get(int(label)) for each in raw for label in each["labels"]]
    assert {one.name for one in found} == {name for name in names if name}  # without the number that has no class
    assert None in names
    assert {"car"} <= {one.name for one in found}
    for one in found:
        left, top, right, bottom = one.box
        assert 0 <= left < right <= 1920
        assert 0 <= top < bottom <= 1080
    only = [one for each in loaded(folder, "car").find(frames, 1920, 1080) for one in each]
    assert only == [one for one in found if one.name == "car"]
    assert loaded(folder, threshold=0.99).find(frames, 1920, 1080) == [[], []]


def test_a_thing_that_is_found_twice_counts_once() -> None:
    first, better = Detection("car", (0, 80, 71, 150), 0.7), Detection("car", (0, 79, 70, 150), 0.8)
    behind, other = Detection("car", (30, 80, 101, 150), 0.6), Detection("boat", (0, 80, 71, 150), 0.5)
    assert without_doubles([first, behind, better, other]) == [behind, better, other]
    assert without_doubles([first, first]) == [first]


def test_what_is_no_detector_or_knows_no_such_class_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="knows no class dog; it knows: car, cat"):
        loaded(folder, "dog")
    with pytest.raises(ModelError, match="embedded:captioner is a blip model; objects are found by: rt_detr, "):
        Detector("embedded:captioner", CPU, torch.float32, threshold=0.5, classes=())
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        loaded(tmp_path)
