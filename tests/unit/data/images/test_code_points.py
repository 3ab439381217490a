"""Images that name their colours by code points: what a colour-managed viewer shows is trained, or they are named."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from finetune.data.images import decode
from finetune.errors import DataError
from finetune.reporting import thumbnails
from tests import profiles
from tests.unit.data.images.test_colour import LIMIT, assert_shown, patches, stored, with_alpha
from tests.unit.data.images.test_gamma import said_of

SRGB, BT2020, P3 = 1, 9, 12
LINEAR_CURVE, SRGB_CURVE, PQ, HLG = 8, 13, 16, 18
# Columns as in tests.profiles, of the profiles that browsers use (skcms).
MATRICES = {
    SRGB: profiles.SRGB,
    P3: np.array([[0.515102, 0.291965, 0.157153], [0.241182, 0.692236, 0.0665819], [-0.00104941, 0.0418818, 0.784378]]),
    BT2020: np.array(
        [[0.673459, 0.165661, 0.125100], [0.279033, 0.675338, 0.0456288], [-0.00193139, 0.0299794, 0.797162]]
    ),
}
POWERS = {LINEAR_CURVE: 1.0, 4: 2.2, 5: 2.8, 1: 2.4, 14: 2.4}


def said(primaries, curve, *, matrix=0, full=1):
    return profiles.chunk(b"cICP", bytes([primaries, curve, matrix, full]))


def read(folder, values, bits, chunks, icc=b""):
    (folder / "a.png").write_bytes(profiles.png(values, bits, icc, said=chunks))
    return decode.open_rgb(folder / "a.png", LIMIT)


def light_of_srgb(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def shown(values, primaries, curve):
    light = light_of_srgb(values) if curve == SRGB_CURVE else values ** POWERS[curve]
    return profiles.rgb_shown(light, MATRICES[primaries], 1.0)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("primaries", "curve"),
    [*((one, SRGB_CURVE) for one in MATRICES), *((P3, curve) for curve in POWERS), (SRGB, LINEAR_CURVE)],
)
def test_colours(tmp_path, primaries, curve, bits, alpha):
    values, exact = stored(patches(3), bits)
    image = read(tmp_path, with_alpha(values, bits) if alpha else values, bits, said(primaries, curve))
    assert_shown(image, shown(exact, primaries, curve))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("curve", [SRGB_CURVE, *POWERS])
def test_greys(tmp_path, curve, bits):
    values, exact = stored(np.linspace(0, 1, 600)[None, :, None], bits)
    assert_shown(read(tmp_path, values, bits, said(P3, curve)), shown(exact.repeat(3, axis=2), SRGB, curve))


@pytest.mark.parametrize("bits", [8, 16])
def test_they_count_before_profile_and_other_chunks(tmp_path, bits):
    values, exact = stored(patches(3), bits)
    others = profiles.chunk(b"sRGB", b"\0") + said_of(1.0, None)
    icc = profiles.rgb_profile(profiles.ADOBE, 1.8)
    assert_shown(read(tmp_path, values, bits, others + said(P3, SRGB_CURVE), icc), shown(exact, P3, SRGB_CURVE))
    assert_shown(read(tmp_path, values, bits, said(SRGB, SRGB_CURVE), icc), exact * 255)


def test_what_is_left_open_is_what_the_other_chunks_say(tmp_path):
    values, exact = stored(patches(3), 8)
    image = read(tmp_path, values, 8, said(2, 2) + said_of(1.0, None))
    assert_shown(image, profiles.rgb_shown(exact, profiles.SRGB, 1.0))


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (said(BT2020, PQ), r"is an HDR image \(PQ\); save it as an sRGB image"),
        (said(BT2020, HLG), r"is an HDR image \(HLG\)"),
        (said(SRGB, 9), r"colours that can't be converted \(primaries 1, transfer 9, full range\)"),
        (said(10, SRGB_CURVE), "primaries 10, transfer 13, full range"),
        (said(SRGB, SRGB_CURVE, full=0), "primaries 1, transfer 13, narrow range"),
    ],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_what_no_such_screen_shows_is_named(tmp_path, chunk, reason, bits):
    with pytest.raises(DataError, match=rf"a\.png: .*{reason}"):
        read(tmp_path, np.zeros((1, 1, 3)), bits, chunk)
    with pytest.raises(DataError, match=reason):
        decode.check(tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), LIMIT)
    assert thumbnails.data_uri(tmp_path / "a.png", 8)  # what was drawn elsewhere is looked at all the same


def test_a_chunk_that_is_cut_short_says_nothing(tmp_path):
    values, exact = stored(patches(3), 8)
    assert_shown(read(tmp_path, values, 8, profiles.chunk(b"cICP", b"\x0c\x0d\x00")), exact * 255)


@pytest.mark.parametrize(
    ("primaries", "curve", "shown_as"),
    [
        (SRGB, SRGB_CURVE, SRGB_CURVE),
        (P3, SRGB_CURVE, SRGB_CURVE),
        (P3, 1, SRGB_CURVE),
        (P3, 2, SRGB_CURVE),
        (SRGB, 4, 4),
    ],
)
def test_colours_of_an_avif(tmp_path, primaries, curve, shown_as):
    values = write_avif(tmp_path / "a.avif", primaries, curve)
    assert_shown(decode.open_rgb(tmp_path / "a.avif", LIMIT), shown(values, primaries, shown_as))


def test_the_profile_of_an_avif_counts_before_its_code_points(tmp_path):
    values = write_avif(tmp_path / "a.avif", P3, LINEAR_CURVE, icc_profile=profiles.rgb_profile(profiles.ADOBE, 1.8))
    assert_shown(decode.open_rgb(tmp_path / "a.avif", LIMIT), profiles.rgb_shown(values, profiles.ADOBE, 1.8))


def test_an_avif_in_hdr_is_named(tmp_path):
    write_avif(tmp_path / "a.avif", BT2020, PQ)
    with pytest.raises(DataError, match=r"a\.avif: is an HDR image \(PQ\)"):
        decode.open_rgb(tmp_path / "a.avif", LIMIT)


def test_the_report_shows_the_same_colours(tmp_path):
    (tmp_path / "a.png").write_bytes(profiles.png(np.full((8, 8, 3), 55), 8, b"", said=said(SRGB, LINEAR_CURVE)))
    uri = thumbnails.data_uri(tmp_path / "a.png", 8)
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert_shown(image, shown(np.full((8, 8, 3), 55 / 255), SRGB, LINEAR_CURVE))


def write_avif(file, primaries, curve, **options):
    """A file of one colour, and its values, 0 … 1. Pillow writes code points of its own, of 16 bits each."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (180, 60, 90)).save(stream, "AVIF", quality=100, subsampling="4:4:4", **options)
    head, rest = stream.getvalue().split(b"colrnclx")
    file.write_bytes(head + b"colrnclx" + bytes([0, primaries, 0, curve]) + rest[4:])
    with Image.open(stream) as plain:
        return np.asarray(plain.convert("RGB")) / 255
