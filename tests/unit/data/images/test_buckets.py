"""Aspect buckets, as properties."""

import math

import pytest

from finetune.data.images import buckets

SETTINGS = [(128, 16, 2.0), (512, 64, 2.0), (1024, 64, 4.0), (512, 8, 3.0), (96, 32, 1.0)]


@pytest.mark.parametrize(("resolution", "step", "max_aspect"), SETTINGS)
def test_sides_area_and_aspect(resolution, step, max_aspect):
    made = buckets.make(resolution, step=step, max_aspect=max_aspect)
    assert (resolution, resolution) in made
    assert len(made) == len(set(made))
    for width, height in made:
        assert width % step == height % step == 0
        assert max(width, height) <= max_aspect * min(width, height) + 1e-6
        # Rounding one side by half a step is all that may be lost.
        assert abs(width * height - resolution**2) <= step / 2 * max(width, height)
        assert (height, width) in made


def test_square_only_for_aspect_one():
    assert buckets.make(512, step=64, max_aspect=1.0) == [(512, 512)]


@pytest.mark.parametrize(("resolution", "step", "max_aspect"), SETTINGS)
def test_nearest_is_nearest_and_buckets_map_to_their_own_shape(resolution, step, max_aspect):
    made = buckets.make(resolution, step=step, max_aspect=max_aspect)
    for width, height in made:
        chosen = buckets.nearest(width * 3, height * 3, made)
        assert chosen[0] * height == chosen[1] * width
    for width, height in [(1, 1000), (1000, 1), (640, 480), (333, 500), (16, 9)]:
        chosen = buckets.nearest(width, height, made)
        distance = abs(math.log(width / height) - math.log(chosen[0] / chosen[1]))
        assert all(distance <= abs(math.log(width / height) - math.log(w / h)) + 1e-6 for w, h in made)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1, 1), (3, 1000), (5000, 4999), (64, 64)])
@pytest.mark.parametrize("bucket", [(128, 128), (96, 176), (176, 96)])
def test_crop_lies_inside_is_centred_and_has_the_shape(size, bucket):
    left, top, width, height = buckets.centre_crop(*size, bucket)
    assert left >= 0 <= top
    assert left + width <= size[0]
    assert top + height <= size[1]
    assert width == size[0] or height == size[1], "nothing is lost on one axis"
    assert abs((size[0] - width) - 2 * left) <= 1 >= abs((size[1] - height) - 2 * top)
    ideal = bucket[0] / bucket[1]
    # The crop is whole pixels: its shape may be off by one of them.
    assert (width - 1) / (height + 1) <= ideal <= (width + 1) / max(height - 1, 1e-9)


def test_upscaling_is_seen():
    assert buckets.upscales(100, 300, (128, 128))
    assert not buckets.upscales(128, 128, (128, 128))
