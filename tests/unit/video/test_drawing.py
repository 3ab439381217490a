"""Labels in a frame: large enough to be read, in the frame, and no two over one another where there is room."""

import numpy as np
import pytest
from PIL import Image

from finetune.video import drawing
from finetune.video.drawing import Area, clock, draw, label_area, stamp


def test_a_label_stands_above_its_box_or_where_it_covers_no_other() -> None:
    size, frame = (40, 16), (320, 180)
    box = (20, 40, 100, 120)
    above = label_area(box, size, frame, [])
    assert above == (20, 24, 60, 40)
    right = label_area(box, size, frame, [above])
    assert right == (60, 24, 100, 40)
    inside = label_area(box, size, frame, [above, right])
    assert inside == (20, 40, 60, 56)
    assert label_area((20, 4, 100, 120), size, frame, []) == (20, 4, 60, 20)  # no room above
    assert label_area((300, 40, 320, 60), size, frame, []) == (280, 24, 320, 40)
    assert label_area((0, 2, 16, 14), size, (16, 14), []) == (0, 0, 16, 14)  # larger than the frame


def test_labels_lie_in_the_frame_and_apart_wherever_boxes_are() -> None:
    rng = np.random.default_rng(0)
    width, height = 640, 360
    for _ in range(200):
        placed: list[Area] = []
        for left, top in 2 * rng.integers(-20, [260, 140], (8, 2)):
            box = (max(0, left), max(0, top), min(width, left + 120), min(height, top + 80))
            placed.append(label_area(box, (60, 16), (width, height), placed))
            assert min(placed[-1]) >= 0
            assert placed[-1][2] - placed[-1][0] == 60
            assert placed[-1][3] - placed[-1][1] == 16
            assert placed[-1][2] <= width
            assert placed[-1][3] <= height
        covered = np.zeros((height, width), int)
        for left, top, right, bottom in placed:
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


@pytest.mark.parametrize(
    ("size", "letters"), [((320, 180), 12), ((640, 480), 12), ((1280, 720), 18), ((2160, 3840), 54)]
)
def test_letters_grow_with_the_frame_and_can_be_read_in_a_small_one(
    size: tuple[int, int], letters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def ink(text: str, height: int) -> np.ndarray:
        asked.append(height)
        return np.full((4, 8), 255, np.uint8)

    monkeypatch.setattr(drawing, "_ink", ink)
    width, height = size
    planes = tuple(np.full((height // step, width // step), 128, np.uint8) for step in (1, 2, 2))
    draw(planes, [((20.0, 30.0, 90.0, 95.0), "car 1", 1)])
    assert asked == [letters]


def test_a_text_is_inked_in_even_sides_and_only_the_latest_are_kept() -> None:
    high, wide = drawing._ink("traffic light 12", 12).shape
    assert (high % 2, wide % 2) == (0, 0)
    assert 60 < wide < 120
    for number in range(2 * drawing.MOST_TEXTS):
        drawing._ink(str(number), 12)
    assert drawing._ink.cache_info().currsize == drawing.MOST_TEXTS


def test_a_frames_time_stands_in_its_corner() -> None:
    assert [clock(second) for second in (0, 7.4, 59.96, 62.5, 3605)] == [
        *("0:00.0", "0:07.4", "1:00.0", "1:02.5", "60:05.0")
    ]
    image = Image.new("RGB", (320, 180), "grey")
    stamp(image, 62.5)
    changed = (np.asarray(image) != 128).any(2)
    assert not changed[:140].any()
    assert not changed[:, :220].any()
    assert np.asarray(image)[150:, 240:].min() == 0
    assert np.asarray(image)[150:, 240:].max() == 255
