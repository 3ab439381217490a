"""PNGs without a profile that say how they were encoded: what is trained is what a colour-managed viewer shows."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from finetune.data.images import decode
from finetune.reporting import thumbnails
from tests import profiles
from tests.unit.data.images.test_colour import LIMIT, assert_shown, patches, stored, with_alpha

SRGB_XY = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
ADOBE_XY = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)  # Adobe RGB (1998), §4.3.1
MATRICES = {None: profiles.SRGB, SRGB_XY: profiles.SRGB, ADOBE_XY: profiles.ADOBE}
SRGB_CHUNK = profiles.chunk(b"sRGB", b"\0")
LINEAR = profiles.gamma_chunk(1.0)


def read(folder, values, bits, said, icc=b""):
    (folder / "a.png").write_bytes(profiles.png(values, bits, icc, said=said))
    return decode.open_rgb(folder / "a.png", LIMIT)


def said_of(gamma, xy):
    return profiles.gamma_chunk(gamma) + (profiles.chromaticities_chunk(xy) if xy else b"")


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("xy", MATRICES)
@pytest.mark.parametrize("gamma", [1.0, 0.55556, 1.8])
def test_colours(tmp_path, gamma, xy, bits, alpha):
    values, exact = stored(patches(3), bits)
    shown = read(tmp_path, with_alpha(values, bits) if alpha else values, bits, said_of(gamma, xy))
    assert_shown(shown, profiles.rgb_shown(exact, MATRICES[xy], 1 / gamma))


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("xy", MATRICES)
@pytest.mark.parametrize("gamma", [1.0, 0.55556, 1.8])
def test_greys(tmp_path, gamma, xy, bits, alpha):
    values, exact = stored(np.linspace(0, 1, 600)[None, :, None], bits)
    shown = read(tmp_path, with_alpha(values, bits) if alpha else values, bits, said_of(gamma, xy))
    assert_shown(shown, profiles.grey_shown(exact, 1 / gamma))


def test_palettes(tmp_path):
    image = Image.fromarray((patches(3, (0.0, 0.2, 0.5, 1.0)) * 255).astype(np.uint8)).quantize(64)
    image.save(tmp_path / "palette.png")
    head, pixels = (tmp_path / "palette.png").read_bytes().split(b"PLTE")
    (tmp_path / "a.png").write_bytes(head[:-4] + LINEAR + head[-4:] + b"PLTE" + pixels)
    exact = np.asarray(image.convert("RGB")) / 255
    assert_shown(decode.open_rgb(tmp_path / "a.png", LIMIT), profiles.rgb_shown(exact, profiles.SRGB, 1.0))


def test_turned_images(tmp_path):
    values, exact = stored(np.linspace(0, 0.02, 6).reshape(2, 3, 1).repeat(3, axis=2), 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    said = LINEAR + profiles.chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    assert_shown(read(tmp_path, values, 16, said), np.rot90(profiles.rgb_shown(exact, profiles.SRGB, 1.0), -1))


def test_alpha_is_no_colour(tmp_path):
    shown = read(tmp_path, np.array([[[55, 55, 55, 128], [0, 0, 0, 0]]]), 8, LINEAR)
    opaque = profiles.rgb_shown(np.full(3, 55 / 255), profiles.SRGB, 1.0)
    assert_shown(shown, [[opaque * 128 / 255 + 127, [255, 255, 255]]])


def test_white_stays_white_under_another_light(tmp_path):
    tungsten = (0.4476, 0.4074, *SRGB_XY[2:])
    shown = read(tmp_path, np.array([[[255, 255, 255], [128, 128, 128]]]), 8, said_of(1.0, tungsten))
    assert_shown(shown, [[[255] * 3, profiles.rgb_shown(np.full(3, 128 / 255), profiles.SRGB, 1.0)]])


@pytest.mark.parametrize(
    "said",
    [
        profiles.gamma_chunk(0.45455),
        profiles.gamma_chunk(0.45),
        profiles.gamma_chunk(0.0),
        said_of(0.45455, tuple(value + 0.002 for value in SRGB_XY)),
        profiles.chromaticities_chunk(ADOBE_XY),
        SRGB_CHUNK + LINEAR,
        LINEAR + SRGB_CHUNK + profiles.chromaticities_chunk(ADOBE_XY),
    ],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_srgb_is_left_as_it_is(tmp_path, said, bits):
    values, exact = stored(patches(3), bits)
    assert np.abs(np.asarray(read(tmp_path, values, bits, said)) - exact * 255).max() < 1


@pytest.mark.parametrize(
    "xy",
    [(0,) * 8, (0.3127, 0.0, *SRGB_XY[2:]), (0.3127, 0.3290, *(0.3, 0.3) * 3), (40000.0,) * 8],
    ids=["nothing", "no white", "one colour", "absurd"],
)
def test_chromaticities_that_are_none_leave_those_of_srgb(tmp_path, xy):
    values, exact = stored(patches(3), 8)
    assert_shown(read(tmp_path, values, 8, said_of(1.0, xy)), profiles.rgb_shown(exact, profiles.SRGB, 1.0))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_profile_counts_before_the_chunks(tmp_path, bits):
    values, exact = stored(patches(3), bits)
    icc = profiles.rgb_profile(profiles.ADOBE, 1.8)
    shown = read(tmp_path, values, bits, said_of(1.0, SRGB_XY), icc)
    assert_shown(shown, profiles.rgb_shown(exact, profiles.ADOBE, 1.8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(np.asarray(read(tmp_path, values, bits, said_of(1.0, SRGB_XY), srgb)) - exact * 255).max() < 1


@pytest.mark.parametrize(("gamma", "middle"), [(0.00001, 0), (40000.0, 255)])
def test_absurd_numbers_are_shown_as_they_say(tmp_path, gamma, middle):
    shown = np.asarray(
        read(tmp_path, np.array([[[0, 0, 0], [128, 128, 128], [255, 255, 255]]]), 8, said_of(gamma, None))
    )
    assert shown[0, :, 0].tolist() == [0, middle, 255]


def test_the_report_shows_the_same_colours(tmp_path):
    (tmp_path / "a.png").write_bytes(profiles.png(np.full((8, 8, 3), 55), 8, b"", said=LINEAR))
    uri = thumbnails.data_uri(tmp_path / "a.png", 8)
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert_shown(image, profiles.rgb_shown(np.full((8, 8, 3), 55 / 255), profiles.SRGB, 1.0))
