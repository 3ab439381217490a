"""Boxes with names in a frame, drawn into the planes that the encoder takes: no way over RGB and back.

Y [H, W] brightness, U and V [H/2, W/2] colour.
"""

from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from finetune.video.tracks import Box

COLOURS = ((230, 60, 60), (40, 150, 240), (60, 180, 75), (245, 170, 20), (150, 80, 220), (0, 190, 190), (240, 80, 180))
"""sRGB, by the number of a track: neighbours differ."""
LINE = 1 / 240  # of the height
TEXT = 1 / 28
WHITE, BLACK = 235, 16

Planes = tuple[NDArray[np.uint8], ...]


def draw(planes: Planes, boxes: Iterable[tuple[Box, str, int]]) -> None:
    """Draw in place: boxes in the planes' pixels, with a text and a number that says the colour."""
    height, width = planes[0].shape
    thick = max(2, 2 * round(height * LINE / 2))
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
        _label(planes, text, left, top, colour)


def _label(planes: Planes, text: str, left: int, top: int, colour: tuple[int, int, int]) -> None:
    """Above the box, or inside it where there is no room."""
    height, width = planes[0].shape
    ink = _ink(text, max(8, round(height * TEXT)))
    high, wide = (side - side % 2 for side in ink.shape)
    left = max(0, min(left, width - wide))
    left, top = left - left % 2, top - high if top >= high else top
    high, wide = min(high, height - top), min(wide, width - left)
    _fill(planes, (top, top + high), (left, left + wide), colour)
    area = planes[0][top : top + high, left : left + wide]
    share = ink[:high, :wide].astype(np.float32) / 255
    tone = BLACK if colour[0] > 140 else WHITE
    area[:] = (area + (tone - area.astype(np.float32)) * share).astype(np.uint8)


def _fill(planes: Planes, rows: tuple[int, int], columns: tuple[int, int], colour: tuple[int, int, int]) -> None:
    for plane, value, step in zip(planes, colour, (1, 2, 2), strict=True):
        plane[rows[0] // step : rows[1] // step, columns[0] // step : columns[1] // step] = value


@cache
def _ink(text: str, size: int) -> NDArray[np.uint8]:
    """A text as shares of ink, 0 to 255, with a little room around."""
    font = ImageFont.load_default(size)
    left, _, right, _ = font.getbbox(text)
    pad = size // 4
    image = Image.new("L", (round(right - left) + 2 * pad, round(size * 1.3)))
    ImageDraw.Draw(image).text((pad - left, round(size * 0.08)), text, fill=255, font=font)
    return np.asarray(image)


@cache
def yuv(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """A colour in limited range (ITU-R BT.601)."""
    red, green, blue = (value / 255 for value in rgb)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return round(16 + 219 * luma), round(128 + 126.4 * (blue - luma)), round(128 + 159.6 * (red - luma) * 0.8935)
