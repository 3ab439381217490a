"""Videos: what is in them, and images for training out of them. Commands without a training recipe, each a module with
a function `main(words) -> int`; they need the extra `video`."""

COMMANDS = {
    "annotate": "find objects in a video: a labelled video, JSON, COCO, YOLO, CVAT, a report",
    "frames": "take sharp, distinct images out of a video, for training",
}
