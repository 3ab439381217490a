"""Aspect-ratio buckets: few image shapes of about one area, so that images keep theirs and batches are full."""

import math
from collections.abc import Sequence

Bucket = tuple[int, int]  # width, height in pixels


def make(resolution: int, *, step: int, max_aspect: float) -> list[Bucket]:
    """Every bucket with sides that are multiples of `step`, an area of about resolution², and the longer side at most
    `max_aspect` times the shorter; sorted from tall to wide. The square is always among them.

    resolution, step: pixels.
    """
    area = resolution**2
    square = max(1, round(resolution / step)) * step
    found = {(square, square)}
    side = step
    while side * side <= max_aspect * area + step * step:
        other = max(1, round(area / side / step)) * step
        if max(side, other) <= max_aspect * min(side, other) + 1e-9:
            found |= {(side, other), (other, side)}
        side += step
    return sorted(found, key=lambda bucket: (bucket[0] / bucket[1], bucket))


def nearest(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket closest in log aspect ratio, hence the least cropped; of equals the larger one."""

    def distance(bucket: Bucket) -> tuple[float, int]:
        return round(abs(math.log(width * bucket[1] / (height * bucket[0]))), 9), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


def centre_crop(width: int, height: int, bucket: Bucket) -> tuple[int, int, int, int]:
    """The largest centred part (left, top, width, height) of the bucket's shape, in the image's own pixels."""
    scale = max(bucket[0] / width, bucket[1] / height)
    crop_width = min(width, max(1, round(bucket[0] / scale)))
    crop_height = min(height, max(1, round(bucket[1] / scale)))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def upscales(width: int, height: int, bucket: Bucket) -> bool:
    """Whether filling the bucket enlarges the image: its pixels are then invented."""
    return width < bucket[0] or height < bucket[1]
