"""What is trained is what a colour-managed viewer shows: profiles of every kind, depth and mode of image."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageCms

from finetune.data.images import colour, decode
from tests import profiles

LIMIT = 10_000_000
LEVELS = (0.0, 0.004, 0.02, 0.1, 0.3, 0.5, 0.75, 1.0)


def patches(channels, levels=LEVELS):
    """(1, N, channels) of 0 … 1."""
    return np.array(list(itertools.product(levels, repeat=channels)))[None]


def stored(values, bits):
    """Integers of so many bits, and the colours that these are exactly."""
    whole = np.round(values * (2**bits - 1)).astype(np.uint16)
    return whole, whole / (2**bits - 1)


def with_alpha(values, bits):
    return np.concatenate([values, np.full_like(values[..., :1], 2**bits - 1)], axis=-1)


def assert_shown(read, expected):
    assert np.abs(np.asarray(read, float) - expected).max() <= 2


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("primaries", "gamma"), [("SRGB", 1.0), ("ADOBE", 2.19921875), ("ADOBE", 1.0)])
def test_rgb_through_its_profile(tmp_path, primaries, gamma, bits, alpha):
    matrix = getattr(profiles, primaries)
    values, exact = stored(patches(3), bits)
    icc = profiles.rgb_profile(matrix, gamma, name="GIMP built-in Linear sRGB")
    (tmp_path / "a.png").write_bytes(profiles.png(with_alpha(values, bits) if alpha else values, bits, icc))
    assert_shown(decode.open_rgb(tmp_path / "a.png", LIMIT), profiles.rgb_shown(exact, matrix, gamma))


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("gamma", [1.0, 1.8, 3.0])
def test_grey_through_its_profile(tmp_path, gamma, bits, alpha):
    values, exact = stored(np.linspace(0, 1, 600)[None, :, None], bits)
    icc = profiles.grey_profile(gamma)
    (tmp_path / "a.png").write_bytes(profiles.png(with_alpha(values, bits) if alpha else values, bits, icc))
    assert_shown(decode.open_rgb(tmp_path / "a.png", LIMIT), profiles.grey_shown(exact, gamma))


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk_through_its_profile(tmp_path, suffix):
    inks = np.repeat(np.repeat(patches(4, (0.0, 0.2, 0.45)).reshape(9, 9, 4), 16, axis=0), 16, axis=1)
    values, exact = stored(inks, 8)
    image = Image.frombytes("CMYK", (144, 144), values.astype(np.uint8).tobytes())
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    image.save(tmp_path / f"a.{suffix}", icc_profile=profiles.cmyk_profile(), **options)
    read = np.asarray(decode.open_rgb(tmp_path / f"a.{suffix}", LIMIT))
    assert_shown(read[8::16, 8::16], profiles.cmyk_shown(exact[8::16, 8::16]))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_sixteen_bit_grey_in_a_tiff(tmp_path, compression):
    values, exact = stored(np.linspace(0, 1, 600)[None, :, None], 16)
    image = Image.fromarray(values[..., 0])
    image.save(tmp_path / "a.tif", icc_profile=profiles.grey_profile(1.0), compression=compression)
    assert_shown(decode.open_rgb(tmp_path / "a.tif", LIMIT), profiles.grey_shown(exact, 1.0))


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colours_in_a_tiff(tmp_path, channels, order, deflate):
    values, exact = stored(patches(channels, (0.0, 0.004, 0.2, 0.45)), 16)
    icc = profiles.rgb_profile(profiles.SRGB, 1.0) if channels == 3 else profiles.cmyk_profile()
    shown = profiles.rgb_shown(exact, profiles.SRGB, 1.0) if channels == 3 else profiles.cmyk_shown(exact)
    (tmp_path / "a.tif").write_bytes(profiles.tiff(values, icc, order=order, deflate=deflate))
    assert_shown(decode.open_rgb(tmp_path / "a.tif", LIMIT), shown)


def test_alpha_is_no_colour(tmp_path):
    values = np.array([[[32768, 16384, 65535, 32768], [0, 0, 0, 0]]])
    icc = profiles.rgb_profile(profiles.SRGB, 1.0)
    (tmp_path / "a.png").write_bytes(profiles.png(values, 16, icc))
    shown = profiles.rgb_shown(values[0, 0, :3] / 65535, profiles.SRGB, 1.0)
    read = np.asarray(decode.open_rgb(tmp_path / "a.png", LIMIT), float)
    assert_shown(read[0, 0], shown / 2 + 127.5)
    assert read[0, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("rotated", [3, 6])
def test_sixteen_bits_are_turned_with_their_low_bytes(tmp_path, rotated):
    values, exact = stored(np.linspace(0, 0.02, 6).reshape(2, 3, 1).repeat(3, axis=2), 16)
    exif = Image.Exif()
    exif[0x0112] = rotated
    extra = profiles.chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    icc = profiles.rgb_profile(profiles.SRGB, 1.0)
    (tmp_path / "a.png").write_bytes(profiles.png(values, 16, icc, extra=extra))
    shown = np.rot90(profiles.rgb_shown(exact, profiles.SRGB, 1.0), {3: 2, 6: -1}[rotated])
    assert_shown(decode.open_rgb(tmp_path / "a.png", LIMIT), shown)


def test_tall_images_of_sixteen_bits_are_computed_in_parts(monkeypatch):
    values = np.random.default_rng(0).integers(0, 65536, (150, 5, 3))
    high, low = (Image.fromarray(part.astype(np.uint8)) for part in (values >> 8, values & 255))
    icc = profiles.rgb_profile(profiles.ADOBE, 1.8)
    assert_shown(colour.to_srgb(high, icc, low), profiles.rgb_shown(values / 65535, profiles.ADOBE, 1.8))


def srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("icc", [srgb(), None, b"no profile", profiles.grey_profile(1.0), profiles.cmyk_profile()])
def test_srgb_and_profiles_of_another_kind_change_nothing(icc):
    image = Image.fromarray((patches(3) * 255).astype(np.uint8))
    assert not colour.is_needed(icc, "RGB")
    assert colour.to_srgb(image, icc) is not None
    assert np.array_equal(np.asarray(colour.to_srgb(image, icc)), np.asarray(image))


def test_srgb_by_another_name_is_srgb():
    renamed = srgb().replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    assert not colour.is_needed(renamed, "RGB")
    assert colour.is_needed(profiles.rgb_profile(profiles.SRGB, 1.0, name="sRGB IEC61966-2.1"), "RGB")
