"""What other tools read of an annotated video: COCO, YOLO, CVAT; and the page for people."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image

from finetune.video.records import Annotated
from tests.unit.video.films import FRAMES, SIDE, lines, place


def test_coco_is_read_by_its_own_package(done: tuple[Path, Annotated]) -> None:
    from pycocotools.coco import COCO

    folder, record = done
    coco = COCO(str(folder / "coco.json"))
    assert len(coco.getImgIds()) == record.looks
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["nothing", "square"]
    (number,) = coco.getCatIds(catNms=["square"])
    for image in coco.loadImgs(coco.getImgIds(catIds=[number])):
        assert (folder / image["file_name"]).is_file()
        (one,) = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
        left = place(2 * image["id"])
        assert one["bbox"] == pytest.approx([left, 20, SIDE, SIDE], abs=1.5)
        assert one["area"] == pytest.approx(SIDE * SIDE, rel=0.2)


def test_yolo_files_lie_and_read_as_its_format_says(done: tuple[Path, Annotated]) -> None:
    """docs.ultralytics.com/datasets/detect: a text beside each image, `class x y width height` as shares of it."""
    folder, record = done
    data = yaml.safe_load((folder / "data.yaml").read_text())
    assert data["names"] == {0: "nothing", 1: "square"}
    images = sorted((folder / data["train"]).glob("*.jpg"))
    assert len(images) == record.looks
    for image in images:
        label = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
        (line,) = label.read_text().splitlines()
        number, *box = line.split()
        x, y, wide, high = map(float, box)
        assert data["names"][int(number)] == "square"
        assert all(0 < value < 1 for value in (x, y, wide, high))
        assert (x - wide / 2) * record.width == pytest.approx(place(2 * int(image.stem)), abs=1.5)
        assert (y + high / 2) * record.height == pytest.approx(20 + SIDE, abs=1.5)


@pytest.mark.exhaustive
def test_other_readers_find_the_same_boxes(done: tuple[Path, Annotated]) -> None:
    """Of YOLO, COCO and CVAT files. Both packages bring OpenCV, which nothing else here needs."""
    supervision = pytest.importorskip("supervision", reason="pip install supervision datumaro")
    datumaro = pytest.importorskip("datumaro", reason="pip install supervision datumaro")
    folder, _ = done
    found = [{round(2 * row["frame_id"]): row["objects"][0]["bbox"]} for row in lines(folder) if row["objects"]]
    expected = {frame: box for each in found for frame, box in each.items()}
    assert len(expected) > 100
    of_yolo = supervision.DetectionDataset.from_yolo(
        str(folder / "images"), str(folder / "labels"), str(folder / "data.yaml")
    )
    of_coco = supervision.DetectionDataset.from_coco(str(folder / "images"), str(folder / "coco.json"))
    for read in (of_yolo, of_coco):
        assert read.classes == ["nothing", "square"]
        boxes = {2 * int(Path(name).stem): part.xyxy for name, part in read.annotations.items() if len(part)}
        assert boxes.keys() == expected.keys()
        assert all(boxes[frame] == pytest.approx(np.array([box]), abs=0.1) for frame, box in expected.items())
    of_cvat = datumaro.Dataset.import_from(str(folder / "cvat.xml"), "cvat")
    seen = {
        int(item.id.rpartition("_")[2]): box.points
        for item in of_cvat
        for box in item.annotations
        if not box.attributes["outside"]
    }
    assert seen.keys() == expected.keys()
    assert all(seen[frame] == pytest.approx(box, abs=0.1) for frame, box in expected.items())


def test_cvat_holds_every_track_over_the_sources_frames(done: tuple[Path, Annotated]) -> None:
    """docs.cvat.ai, "CVAT for video 1.1": the elements, and what each must carry."""
    folder, record = done
    root = ElementTree.parse(folder / "cvat.xml").getroot()
    assert (root.tag, root.findtext("version")) == ("annotations", "1.1")
    assert root.findtext("meta/task/size") == str(FRAMES)
    assert root.findtext("meta/task/mode") == "interpolation"
    assert [label.text for label in root.findall("meta/task/labels/label/name")] == ["nothing", "square"]
    tracks = root.findall("track")
    assert len(tracks) == record.counts["square"]
    boxes = 0
    for track in tracks:
        assert track.attrib["label"] == "square"
        seen = track.findall("box")
        frames_seen = [int(box.attrib["frame"]) for box in seen]
        assert frames_seen == sorted(set(frames_seen))
        assert all({"outside", "occluded", "keyframe", "xtl", "ytl", "xbr", "ybr"} <= box.attrib.keys() for box in seen)
        assert [box.attrib["outside"] for box in seen[:-1]] == ["0"] * (len(seen) - 1)
        assert seen[-1].attrib["outside"] == "1" or frames_seen[-1] == FRAMES - 2
        for box in seen:
            if box.attrib["outside"] == "0":
                boxes += 1
                assert float(box.attrib["xtl"]) == pytest.approx(place(int(box.attrib["frame"])), abs=1.5)
    assert boxes == record.objects


def test_the_page_shows_what_is_seen_when(done: tuple[Path, Annotated]) -> None:
    folder, record = done
    shown = (folder / "report.html").read_text()
    assert shown.count("cut at ") == 12
    assert "square, 0.0–25.0 s" in shown
    assert f"{record.counts['square']} tracks" in shown
    assert '<a href="labelled.mp4">' in shown
    with Image.open(folder / "sheet.jpg") as sheet:  # each frame's time in its corner, white on black
        corner = np.asarray(sheet.convert("L"))[180:212, 250:318]
    assert (corner.min() < 40, corner.max() > 200) == (True, True)
    assert "http:" not in shown.replace("http-equiv", "")
