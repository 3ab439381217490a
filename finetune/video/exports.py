"""What was found, in the formats of other tools: COCO, YOLO, CVAT."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from finetune.run.atomic import replace_folder, write_atomically
from finetune.video.records import Annotated

Row = dict[str, Any]


def write(folder: Path, names: Sequence[str], record: Annotated, rows: Sequence[Row]) -> None:
    """`coco.json`, `data.yaml` with `labels/`, `cvat.xml`. Images, where they are kept, lie in `images/`."""
    if "coco" in names:
        write_atomically(folder / "coco.json", json.dumps(coco(record, rows)))
    if "yolo" in names:
        with replace_folder(folder / "labels") as labels:
            for row in rows:
                text = "".join(f"{line}\n" for line in yolo_lines(record, row))
                (labels / f"{row['frame_id']:06d}.txt").write_text(text, encoding="utf-8")
        data = {"train": "images", "val": "images", "names": dict(enumerate(record.classes))}
        write_atomically(folder / "data.yaml", yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    if "cvat" in names:
        write_atomically(folder / "cvat.xml", cvat(record, rows))


def coco(record: Annotated, rows: Sequence[Row]) -> dict[str, Any]:
    """COCO's object detection: boxes as left, top, width, height; categories count from 1."""
    numbers = {name: number for number, name in enumerate(record.classes, start=1)}
    annotations: list[dict[str, Any]] = []
    for row in rows:
        for one in row["objects"]:
            left, top, right, bottom = one["bbox"]
            box = [left, top, round(right - left, 2), round(bottom - top, 2)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": row["frame_id"],
                    "category_id": numbers[one["class"]],
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                    "score": one["score"],
                    "track_id": one["track"],
                }
            )
    return {
        "info": {"description": f"{Path(record.video).name}, found by {record.model}", "version": "1.0"},
        "licenses": [],
        "images": [
            {
                "id": row["frame_id"],
                "file_name": f"images/{row['frame_id']:06d}.jpg",
                "width": record.width,
                "height": record.height,
                "timestamp_sec": row["timestamp_sec"],
            }
            for row in rows
        ],
        "categories": [{"id": number, "name": name, "supercategory": ""} for name, number in numbers.items()],
        "annotations": annotations,
    }


def yolo_lines(record: Annotated, row: Row) -> Iterator[str]:
    """Number of the class, middle and size as shares of the image."""
    for one in row["objects"]:
        left, top, right, bottom = one["bbox"]
        values = (
            (left + right) / 2 / record.width,
            (top + bottom) / 2 / record.height,
            (right - left) / record.width,
            (bottom - top) / record.height,
        )
        yield " ".join([str(record.classes.index(one["class"])), *(f"{min(1.0, value):.6f}" for value in values)])


def cvat(record: Annotated, rows: Sequence[Row]) -> bytes:
    """CVAT for video 1.1: tracks over the frames of the source, boxes between two looks interpolated by CVAT."""
    root = ElementTree.Element("annotations")
    _text(root, "version", "1.1")
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    size = {"size": record.frames, "mode": "interpolation", "overlap": 0, "start_frame": 0}
    for name, value in {"name": Path(record.video).name, **size, "stop_frame": record.frames - 1}.items():
        _text(task, name, str(value))
    labels = ElementTree.SubElement(task, "labels")
    for name in record.classes:
        label = ElementTree.SubElement(labels, "label")
        _text(label, "name", name)
        ElementTree.SubElement(label, "attributes")
    original = ElementTree.SubElement(task, "original_size")
    _text(original, "width", str(record.width))
    _text(original, "height", str(record.height))

    tracks: dict[int, dict[int, Any]] = defaultdict(dict)
    for row in rows:
        for one in row["objects"]:
            tracks[one["track"]][row["source_frame"]] = one
    looked = sorted({row["source_frame"] for row in rows})
    following = dict(pairwise(looked))
    for number, boxes in sorted(tracks.items()):
        label = next(iter(boxes.values()))["class"]
        track = ElementTree.SubElement(root, "track", id=str(number), label=label, source="auto")
        for frame, one in boxes.items():
            _box(track, frame, one["bbox"], outside=False)
            # An object that isn't seen at the next look is outside from there on.
            if (gone := following.get(frame)) is not None and gone not in boxes:
                _box(track, gone, one["bbox"], outside=True)
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _box(track: ElementTree.Element, frame: int, bbox: Sequence[float], *, outside: bool) -> None:
    edges = {name: f"{edge:.2f}" for name, edge in zip(("xtl", "ytl", "xbr", "ybr"), bbox, strict=True)}
    fixed = {"frame": str(frame), "keyframe": "1", "outside": str(int(outside)), "occluded": "0", "z_order": "0"}
    ElementTree.SubElement(track, "box", fixed | edges)


def _text(parent: ElementTree.Element, name: str, text: str) -> None:
    ElementTree.SubElement(parent, name).text = text
