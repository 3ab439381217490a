"""Boxes with names in a frame, drawn into the planes that the encoder takes: no way over RGB and back.

Y [H, W] brightness, U and V [H/2, W/2] colour.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from finetune.video.tracks import Box

COLOURS = ((230, 60, 60), (40, 150, 240), (60, 180, 75), (245, 170, 20), (150, 80, 220), (0, 190, 190), (240, 80, 180))
"""sRGB, by the number of a track: neighbours differ."""
LINE = 1 / 240  # of the height
TEXT, LEAST_TEXT = 1 / 40, 12  # of the shorter side; pixels, below which letters run together
MOST_TEXTS = 256  # kept as ink: tracks count up over the whole video
STAMP = 24  # pixels of 320: the page shows six thumbnails side by side
WHITE, BLACK = 235, 16

Planes = tuple[NDArray[np.uint8], ...]
Area = tuple[int, int, int, int]
"""Left, top, right, bottom in whole pixels."""


def draw(planes: Planes, boxes: Iterable[tuple[Box, str, int]]) -> None:
    """Draw in place: boxes in the planes' pixels, with a text and a number that says the colour."""
    height, width = planes[0].shape
    thick = max(2, 2 * round(height * LINE / 2))
    size = max(LEAST_TEXT, round(min(height, width) * TEXT))
    shown: list[tuple[int, str, Area]] = []
    for box, text, number in boxes:
        left, top, right, bottom = (2 * round(edge / 2) for edge in box)
        left, right = max(0, left), min(width, right)
        top, bottom = max(0, top), min(height, bottom)
        if right - left < 2 * thick or bottom - top < 2 * thick:
            continue
        colour = yuv(COLOURS[number % len(COLOURS)])
        for rows, columns in (
            ((top, top + thick), (left, right)),
            ((bottom - thick, bottom), (left, right)),
            ((top, bottom), (left, left + thick)),
            ((top, bottom), (right - thick, right)),
        ):
            _fill(planes, rows, columns, colour)
        shown.append((number, text, (left, top, right, bottom)))
    placed: list[Area] = []
    for number, text, area in sorted(shown):  # the label that was there first stays where it is
        ink = _ink(text, size)
        placed.append(label_area(area, (ink.shape[1], ink.shape[0]), (width, height), placed))
        _label(planes, ink, placed[-1], yuv(COLOURS[number % len(COLOURS)]))


def stamp(image: Image.Image, seconds: float) -> None:
    """Write a time into the lower right corner of an image, in place."""
    font = ImageFont.load_default(STAMP)
    pen = ImageDraw.Draw(image)
    text, pad = clock(seconds), STAMP // 4
    corner = (image.width, image.height)
    left, top, right, bottom = pen.textbbox(corner, text, font=font, anchor="rd")
    pen.rectangle((left - 2 * pad, top - 2 * pad, right, bottom), fill="black")
    pen.text((corner[0] - pad, corner[1] - pad), text, fill="white", font=font, anchor="rd")


def clock(seconds: float) -> str:
    """ "1:02.5": minutes and seconds."""
    minutes, tenths = divmod(round(10 * seconds), 600)
    return f"{minutes}:{tenths // 10:02d}.{tenths % 10}"


def label_area(box: Area, size: tuple[int, int], frame: tuple[int, int], placed: Sequence[Area]) -> Area:
    """Where a label of this size, width and height, covers the least of those that are placed: above its box, or else
    inside or below it. All sides are even."""
    wide, high = min(size[0], frame[0]), min(size[1], frame[1])
    places = [
        (left, top, left + wide, top + high)
        for top in _tops(box, high, frame[1])
        for left in (max(0, min(edge, frame[0] - wide)) for edge in (box[0], box[2] - wide))
    ]
    return min(places, key=lambda place: sum(_common(place, other) for other in placed))


def _tops(box: Area, high: int, height: int) -> Iterator[int]:
    """Top edges of a label in the frame, the best first; the frame's own where there is no other."""
    above, inside, below = box[1] - high, range(box[1], box[3] - high + 1, high), box[3]
    tops = [top for top in (above, *inside, below) if 0 <= top <= height - high]
    yield from tops or [0]


def _common(one: Area, other: Area) -> int:
    """The pixels that are in both."""
    wide, high = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return max(0, wide) * max(0, high)


def _label(planes: Planes, ink: NDArray[np.uint8], area: Area, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = area
    _fill(planes, (top, bottom), (left, right), colour)
    luma = planes[0][top:bottom, left:right]
    share = ink[: bottom - top, : right - left].astype(np.float32) / 255
    tone = BLACK if colour[0] > 140 else WHITE
    luma[:] = (luma + (tone - luma.astype(np.float32)) * share).astype(np.uint8)


def _fill(planes: Planes, rows: tuple[int, int], columns: tuple[int, int], colour: tuple[int, int, int]) -> None:
    for plane, value, step in zip(planes, colour, (1, 2, 2), strict=True):
        plane[rows[0] // step : rows[1] // step, columns[0] // step : columns[1] // step] = value


@lru_cache(MOST_TEXTS)
def _ink(text: str, size: int) -> NDArray[np.uint8]:
    """A text as shares of ink, 0 to 255, with a little room around; the sides are even."""
    font = ImageFont.load_default(size)
    left, _, right, _ = font.getbbox(text)
    pad = size // 4
    wide, high = (2 * round(side / 2) for side in (right - left + 2 * pad, size * 1.3))
    image = Image.new("L", (wide, high))
    ImageDraw.Draw(image).text((pad - left, round(size * 0.08)), text, fill=255, font=font)
    return np.asarray(image)


@cache
def yuv(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """A colour in limited range (ITU-R BT.601)."""
    red, green, blue = (value / 255 for value in rgb)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return round(16 + 219 * luma), round(128 + 126.4 * (blue - luma)), round(128 + 159.6 * (red - luma) * 0.8935)
