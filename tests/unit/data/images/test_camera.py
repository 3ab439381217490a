"""Cameras' files in Adobe RGB without a profile, and inks without one."""

import numpy as np
import pytest
from PIL import ExifTags, Image

from finetune.data.images import decode
from tests import profiles
from tests.unit.data.images.test_colour import LIMIT, assert_shown, patches

GAMMA = 2.19921875  # Adobe RGB (1998), §4.3.4.2
R03, R98 = (65535, "R03"), (65535, "R98")
SAVED = {"jpg": {"quality": 100, "subsampling": 0}, "tif": {}, "webp": {"lossless": True}, "png": {}}


def exif(space, index=None, orientation=1):
    found = Image.Exif()
    found[0x0112] = orientation
    found[ExifTags.IFD.Exif] = {0xA001: space} | ({ExifTags.IFD.Interop: {1: index}} if index else {})
    return found.tobytes()


def photo():
    """Patches large enough to survive a JPEG."""
    colours = (patches(3, (0.1, 0.4, 0.8)).reshape(3, 9, 3) * 255).astype(np.uint8)
    return Image.fromarray(np.repeat(np.repeat(colours, 16, axis=0), 16, axis=1))


def middles(image):
    return np.asarray(image, float)[8::16, 8::16]


# Pillow writes no interoperability index into a TIFF.
@pytest.mark.parametrize(("suffix", "said"), [*((suffix, (2, None)) for suffix in SAVED), ("jpg", R03), ("webp", R03)])
def test_adobe_rgb_by_exif(tmp_path, suffix, said):
    photo().save(tmp_path / f"a.{suffix}", exif=exif(*said), **SAVED[suffix])
    with Image.open(tmp_path / f"a.{suffix}") as stored:
        values = middles(stored.convert("RGB"))
    read = decode.open_rgb(tmp_path / f"a.{suffix}", LIMIT)
    assert_shown(middles(read), profiles.rgb_shown(values / 255, profiles.ADOBE, GAMMA))


def test_turned_images(tmp_path):
    photo().save(tmp_path / "a.png", exif=exif(*R03, orientation=6))
    shown = profiles.rgb_shown(middles(photo()) / 255, profiles.ADOBE, GAMMA)
    assert_shown(middles(decode.open_rgb(tmp_path / "a.png", LIMIT)), np.rot90(shown, -1))


@pytest.mark.parametrize("said", [exif(1, "R03"), exif(*R98), exif(65535), exif("R03", "R03"), b"Exif\0\0no exif"])
def test_srgb_and_other_texts_change_nothing(tmp_path, said):
    photo().save(tmp_path / "a.png", exif=said)
    assert_shown(middles(decode.open_rgb(tmp_path / "a.png", LIMIT)), middles(photo()))


def test_what_the_file_says_itself_counts_first(tmp_path):
    values = np.array([[[200, 30, 30]]])
    behind = profiles.chunk(b"eXIf", exif(*R03).removeprefix(b"Exif\0\0"))  # behind the pixels
    icc = profiles.rgb_profile(profiles.SRGB, 1.0)
    for own, said, shown in (
        (b"", b"", profiles.rgb_shown(values / 255, profiles.ADOBE, GAMMA)),
        (icc, b"", profiles.rgb_shown(values / 255, profiles.SRGB, 1.0)),
        (b"", profiles.chunk(b"sRGB", b"\0"), values),
        (b"", profiles.gamma_chunk(0.45455), values),
    ):
        (tmp_path / "a.png").write_bytes(profiles.png(values, 8, own, said=said, extra=behind))
        assert_shown(decode.open_rgb(tmp_path / "a.png", LIMIT), shown)


@pytest.mark.parametrize(
    ("profile", "guessed"), [(None, True), (b"no profile", True), (profiles.cmyk_profile(), False)]
)
def test_inks_without_a_profile_are_a_guess(tmp_path, profile, guessed):
    inks = Image.new("CMYK", (32, 32), (10, 200, 30, 40))
    inks.save(tmp_path / "a.jpg", icc_profile=profile, exif=exif(*R03))
    path = tmp_path / "a.jpg"
    assert decode.check(path, path.read_bytes(), LIMIT) == ((32, 32), guessed, False)
    if guessed:  # as browsers show them
        assert_shown(decode.open_rgb(path, LIMIT), np.broadcast_to([206.6, 46.4, 189.7], (32, 32, 3)))
