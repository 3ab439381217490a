"""Images of every kind, written to disk and read back."""

import io
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from finetune.data.images import colour, decode
from finetune.errors import DataError
from tests import profiles

LIMIT = 10_000_000


def upright_size(path, max_pixels):
    return decode.check(path, path.read_bytes(), max_pixels)[0]


def quarters() -> Image.Image:
    """40 x 20 pixels: red, green above blue, white."""
    image = Image.new("RGB", (40, 20))
    for (x, y), name in {(0, 0): "red", (20, 0): "lime", (0, 10): "blue", (20, 10): "white"}.items():
        image.paste(name, (x, y, x + 20, y + 10))
    return image


def difference(image: Image.Image, other: Image.Image) -> float:
    assert image.size == other.size
    return float(np.abs(np.asarray(image, float) - np.asarray(other, float)).mean())


UNTURN = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation, suffix):
    stored = quarters() if UNTURN[orientation] is None else quarters().transpose(UNTURN[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    read = decode.open_rgb(tmp_path / f"a.{suffix}", LIMIT)
    assert difference(read, quarters()) < 4
    assert upright_size(tmp_path / f"a.{suffix}", LIMIT) == (40, 20)


def test_an_orientation_that_exif_does_not_know_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    quarters().save(tmp_path / "a.png", exif=exif)
    assert upright_size(tmp_path / "a.png", LIMIT) == decode.open_rgb(tmp_path / "a.png", LIMIT).size == (40, 20)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_ignored(tmp_path):
    quarters().save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode.open_rgb(tmp_path / "a.png", LIMIT).size == (40, 20)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_on_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 128), (4, 0, 8, 8))
    image.convert(mode).save(tmp_path / "a.png")
    read = np.asarray(decode.open_rgb(tmp_path / "a.png", LIMIT))
    assert (read[:, :4] == 255).all()
    assert (np.abs(read[:, 4:].astype(int) - 127) <= 1).all()


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (4, 0, 8, 8))
    image.save(tmp_path / "a.png", transparency=0)
    read = decode.open_rgb(tmp_path / "a.png", LIMIT)
    assert read.getpixel((1, 1)) == (255, 255, 255)
    assert read.getpixel((6, 1)) == (0, 0, 200)


def test_palette_without_transparency(tmp_path):
    quarters().convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.gif")
    assert difference(decode.open_rgb(tmp_path / "a.gif", LIMIT), quarters()) < 2


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey(tmp_path, mode):
    Image.linear_gradient("L").convert(mode).save(tmp_path / "a.png")
    read = np.asarray(decode.open_rgb(tmp_path / "a.png", LIMIT))
    assert read.shape == (256, 256, 3)
    assert (read[..., 0] == read[..., 1]).all()
    assert read[0].mean() < 5 < 250 < read[-1].mean()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 256 * 4).reshape(4, 256).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    read = np.asarray(decode.open_rgb(tmp_path / f"a.{suffix}", LIMIT))[..., 0]
    assert np.abs(read - values / 257).max() <= 0.51


@pytest.mark.parametrize("top", [1.0, 255.0, 9000.0])
def test_floats_are_scaled_to_their_range(tmp_path, top):
    values = (np.linspace(0, 1, 256) * top).astype(np.float32).reshape(1, 256)
    Image.fromarray(values).save(tmp_path / "a.tif")
    read = np.asarray(decode.open_rgb(tmp_path / "a.tif", LIMIT))[0, :, 0]
    assert np.abs(read - np.arange(256)).max() <= 1


def test_thirty_two_bits(tmp_path):
    values = np.array([[0, 2**30, 2**31 - 1]], dtype=np.int32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(decode.open_rgb(tmp_path / "a.tif", LIMIT))[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk_without_profile(tmp_path):
    quarters().convert("CMYK").save(tmp_path / "a.jpg", quality=98)
    assert difference(decode.open_rgb(tmp_path / "a.jpg", LIMIT), quarters()) < 4


def test_colour_profile_is_applied(tmp_path):
    """An RGB profile with red and blue exchanged must exchange them."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {
        srgb[132 + 12 * i : 136 + 12 * i].decode(): 132 + 12 * i for i in range(int.from_bytes(srgb[128:132], "big"))
    }
    red, blue = tags["rXYZ"], tags["bXYZ"]
    srgb[red : red + 4], srgb[blue : blue + 4] = srgb[blue : blue + 4], srgb[red : red + 4]
    profile = bytes(srgb).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    quarters().save(tmp_path / "a.png", icc_profile=profile)
    red_, green, blue_ = quarters().split()
    assert difference(decode.open_rgb(tmp_path / "a.png", LIMIT), Image.merge("RGB", (blue_, green, red_))) < 3
    exif = Image.Exif()
    exif[0x0112] = 3
    quarters().rotate(180).save(tmp_path / "b.png", icc_profile=profile, exif=exif)
    assert difference(decode.open_rgb(tmp_path / "b.png", LIMIT), Image.merge("RGB", (blue_, green, red_))) < 3


def test_broken_profile_is_ignored(tmp_path):
    quarters().save(tmp_path / "a.png", icc_profile=b"no profile")
    assert difference(decode.open_rgb(tmp_path / "a.png", LIMIT), quarters()) == 0


def test_first_frame_of_an_animation(tmp_path):
    Image.new("RGB", (8, 8), "red").save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]
    )
    assert decode.open_rgb(tmp_path / "a.gif", LIMIT).getpixel((4, 4)) == (255, 0, 0)


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in a few bytes: its data is never there."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + profiles.chunk(b"IHDR", header)
        + profiles.chunk(b"IDAT", zlib.compress(b""))
        + profiles.chunk(b"IEND", b"")
    )


def jpeg(side: int = 256) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


BAD = {
    "zero.jpg": (b"", r"is empty \(0 bytes\)"),
    "phone.jpg": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(500), "is a HEIC image, .*; save it as JPEG"),
    "text.png": (b"hello, this is no image", "is not an image in any of these formats: JPEG, PNG"),
    "short.jpg": (jpeg()[:9000], "is truncated"),
    "header.jpg": (jpeg()[:100], "is (truncated|corrupt|not an image)"),
    "broken.png": (bomb(8), "is (truncated|corrupt)"),
    "bomb.png": (bomb(30_000), "30000 x 30000 pixels are more than data.max_pixels=10000000; .*try data.max_pixels="),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is not an image"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("reader", [decode.open_rgb, upright_size])
def test_bad_pictures_are_named_with_the_reason(tmp_path, name, reader):
    data, reason = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}: {reason}"):
        reader(tmp_path / name, LIMIT)


TEXTS = {
    "zTXt": lambda data: b"Raw\0\0" + zlib.compress(data),
    "iTXt": lambda data: b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(data),
    "tEXt": lambda data: b"Comment\0" + data,
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_good_png_with_long_texts_is_read(tmp_path, kind, after):
    buffer = io.BytesIO()
    quarters().save(buffer, "PNG")
    data = buffer.getvalue()
    text = profiles.chunk(kind.encode(), TEXTS[kind](b'<x tiff:Orientation="6"/>' + b"history " * 2**19))
    at = data.index(b"IEND" if after else b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:at] + text + profiles.chunk(b"tIME", bytes(7)) + text + data[at:])
    limits = (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS)
    turned = quarters().rotate(-90, expand=True) if kind == "iTXt" else quarters()
    assert upright_size(tmp_path / "a.png", LIMIT) == turned.size
    assert difference(decode.open_rgb(tmp_path / "a.png", LIMIT), turned) == 0
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS)


def test_a_large_colour_profile_is_used(tmp_path):
    icc = profiles.rgb_profile(profiles.SRGB, 1.0) + bytes(2**21)
    (tmp_path / "a.png").write_bytes(profiles.png(np.full((4, 4, 3), 128), 8, icc))
    assert decode.open_rgb(tmp_path / "a.png", LIMIT).getpixel((0, 0)) == (188, 188, 188)


def test_texts_without_end_are_refused(tmp_path):
    text = profiles.chunk(b"zTXt", b"Raw\0\0" + zlib.compress(bytes(65 * 2**20)))
    (tmp_path / "a.png").write_bytes(profiles.png(np.zeros((4, 4, 3)), 8, b"", extra=text))
    with pytest.raises(DataError, match=r"a.png: is corrupt .*too large"):
        decode.open_rgb(tmp_path / "a.png", LIMIT)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.995])
def test_the_cheap_check_sees_truncation_of_large_pictures(tmp_path, share):
    data = jpeg(1600)
    (tmp_path / "a.jpg").write_bytes(data)
    assert upright_size(tmp_path / "a.jpg", LIMIT) == (1600, 1600)
    (tmp_path / "a.jpg").write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=r"a.jpg: is truncated"):
        upright_size(tmp_path / "a.jpg", LIMIT)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.jpg: can't be read"):
        decode.open_rgb(tmp_path / "gone.jpg", LIMIT)


def test_the_limit_can_be_raised_above_pillows(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb(30_000))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match=r"bomb.png: is (truncated|corrupt)"):
        upright_size(tmp_path / "bomb.png", 30_000**2)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_all_bad_images_at_once(capsys):
    problems = [f"{name}: is corrupt" for name in BAD]
    with pytest.raises(DataError, match=r"data.skip_bad=true") as caught:
        decode.report_bad(problems, skip=False)
    assert all(name in str(caught.value) for name in BAD)
    decode.report_bad(problems, skip=True)
    assert capsys.readouterr().err.count("warning: left out") == len(BAD)
    decode.report_bad([], skip=False)


@pytest.mark.parametrize("size", [(400, 200), (200, 400), (64, 64), (10, 9), (1, 300)])
def test_fit_fills_the_bucket_and_tells_the_crop(size):
    image, crop = decode.resize_and_crop(Image.new("RGB", size, "teal"), (96, 64))
    assert image.size == (96, 64)
    assert set(image.get_flattened_data()) == {(0, 128, 128)}
    assert crop[0] + crop[2] <= size[0]
    assert crop[1] + crop[3] <= size[1]


def test_fit_shows_what_the_crop_says_without_aliasing():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (512, 512)))  # one pixel black, one white
    fitted, crop = decode.resize_and_crop(stripes.convert("RGB"), (64, 64))
    assert crop == (256, 0, 512, 512)
    assert np.abs(np.asarray(fitted, float) - 127.5).max() < 3, "fine stripes become grey, not coarse stripes"
    marked = Image.new("RGB", (300, 100))
    marked.paste("red", (100, 0, 200, 100))
    fitted, crop = decode.resize_and_crop(marked, (50, 50))
    assert crop == (100, 0, 100, 100)
    assert min(fitted.getchannel("R").get_flattened_data()) > 230


def test_a_file_longer_than_its_pixels_can_be_is_not_read(tmp_path):
    path = tmp_path / "long.png"
    with open(path, "wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(DataError, match=r"long.png: can't be read \(File too large\)"):
        decode.open_rgb(path, 1000)


def most_at_once(paths, monkeypatch, *, room):
    """The most files that four threads held at once."""
    monkeypatch.setattr(decode, "PIXELS_AT_ONCE", room)
    held, most, lock = 0, 0, threading.Lock()

    def hold(path):
        nonlocal held, most
        with decode.file_bytes(path):
            with lock:
                held += 1
                most = max(most, held)
            time.sleep(0.05)
            with lock:
                held -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, paths))
    return most


@pytest.mark.parametrize("kind", ["pixels", "bytes"])
def test_large_images_wait_for_one_another_and_small_ones_do_not(tmp_path, monkeypatch, kind):
    paths = [tmp_path / f"{name}.png" for name in "abcd"]
    for path in paths:
        Image.new("RGB", (100, 80)).save(path) if kind == "pixels" else path.write_bytes(bytes(4 * 8000))
    assert most_at_once(paths, monkeypatch, room=4 * 8000) > 1
    assert most_at_once(paths, monkeypatch, room=2 * 8000) == 2
    assert most_at_once(paths, monkeypatch, room=1) == 1


def test_a_plain_rgb_image_is_not_copied():
    image = Image.new("RGB", (8, 8))
    assert colour.to_srgb(image, None) is image


def test_a_lack_of_memory_is_not_taken_for_a_corrupt_image(tmp_path, monkeypatch):
    file = tmp_path / "wall.png"
    Image.new("RGB", (8, 8)).save(file)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(DataError, match=r"wall\.png: takes more memory than there is"):
        decode.open_rgb(file, 100)


@pytest.mark.parametrize("said", [b"", profiles.gamma_chunk(1.0)], ids=["sRGB", "linear"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_see_through_colour_lies_on_white(tmp_path, channels, bits, said):
    """A neighbour that differs in the last bit alone is a colour."""
    values = np.zeros((1, 3, channels), int)
    values[0, :, 0] = np.array([16, 17, 200]) if bits == 8 else np.array([0x1000, 0x1001, 0xC800])
    key = values[0, 0] if channels == 3 else values[0, 0, :1]
    extra = profiles.chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    (tmp_path / "a.png").write_bytes(profiles.png(values, bits, b"", said=said + extra))
    read = np.asarray(decode.open_rgb(tmp_path / "a.png", LIMIT)).astype(int)[0]
    assert read[0].tolist() == [255, 255, 255]
    exact = values[0, 1:] / (2**bits - 1)
    shown = exact if not said else profiles.rgb_shown(np.broadcast_to(exact, (2, 3)), profiles.SRGB, 1.0) / 255
    assert np.abs(read[1:] - 255 * np.broadcast_to(shown, (2, 3))).max() <= 2


@pytest.mark.parametrize(
    ("format_", "frames", "expected"),
    [
        ("GIF", 2, True),
        ("GIF", 1, False),
        ("PNG", 2, True),
        ("PNG", 1, False),
        ("WEBP", 2, True),
        ("WEBP", 1, False),
        ("TIFF", 2, False),  # pages
        ("JPEG", 1, False),
    ],
)
def test_an_animation_is_known(tmp_path, format_, frames, expected):
    first, *others = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in range(0, 200 * frames, 200)]
    more = {"save_all": True, "append_images": others} if others else {}
    first.save(tmp_path / "a", format=format_, **more)
    data = (tmp_path / "a").read_bytes()
    assert decode.check(tmp_path / "a", data, 10**6)[2] is expected
    if (format_, frames) == ("GIF", 2):  # what follows the first frame is damaged
        assert decode.check(tmp_path / "a", data[:-30], 10**6)[0] == (32, 32)
