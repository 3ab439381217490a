"""Images from disk as upright 8-bit RGB, whatever they are stored as, and cut to a bucket.

No decoder is run before the size is known to be allowed, and only decoders of ordinary image formats are ever used.
"""

import io
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from finetune.data.images import code_points, colour
from finetune.data.images.buckets import Bucket, centre_crop
from finetune.errors import DataError
from finetune.reading import require_size
from finetune.run.progress import plural, say

# Named, because Pillow would otherwise hand an EPS that is called .png to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "TGA")
ORIENTATION = 0x0112  # EXIF tag (Exif 2.32, §4.6.4)
QUARTER_TURNS = (5, 6, 7, 8)  # orientations that exchange width and height
SIXTEEN_TO_EIGHT = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257, rounded
GREY_ALPHA = "LA;16B"  # Pillow's name of how the pixels of a grey PNG of 16 bits with alpha are stored
OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}  # of the two bytes of a value
TEXT_LIMITS = {"MAX_TEXT_CHUNK": 64 * 2**20, "MAX_TEXT_MEMORY": 256 * 2**20}  # bytes; Pillow's are 1 and 64 MiB
PNG = b"\x89PNG\r\n\x1a\n"
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf")
HEIC_REASON = "is a HEIC image, whatever its name says; save it as JPEG or PNG"
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # formats, as Pillow calls them, of animations
FILE_BYTES = 4 << 30  # of an image, three times what `data.max_pixels` of 16 bits take without compression
CHECK_SIDE = 512  # pixels; JPEGs are checked at a reduced size, which still reads every byte
PIXELS_AT_ONCE = 100_000_000  # decoded by all threads together: about 12 bytes each at the peak
_pillow_limit = threading.Lock()


def open_rgb(path: Path, max_pixels: int) -> Image.Image:
    """The image upright in RGB, 8 bits: rotated as EXIF says, colour profile applied, transparency on white, 16 bits
    scaled down, first frame of an animation.

    Raises DataError naming the file and the reason if it is missing, empty, corrupt, truncated, or has more than
    `max_pixels` pixels (seen before anything is decoded).
    """
    with file_bytes(path) as data:
        return rgb(path, data, max_pixels)


def rgb(path: Path, data: bytes, max_pixels: int) -> Image.Image:
    """`open_rgb` from the bytes of the file."""
    image = _open(path, data, max_pixels)
    try:
        low = _low_bytes(image, lambda: _open(path, data, max_pixels))
        image.load()
        return _rgb(_upright(image), low)
    except Exception as error:  # decoders raise whatever they like at broken data
        raise DataError(f"{path}: {_reason(error)}") from error


def shown(image: ImageFile.ImageFile) -> Image.Image:
    """An opened image as `open_rgb` gives it, but the colours of 16 bits by their high bytes: enough to look at."""
    colour.note(image)
    image.load()
    return _rgb(_upright(image), None)


def check(path: Path, data: bytes, max_pixels: int) -> tuple[tuple[int, int], bool, bool]:
    """Of an image that decodes, from the bytes of its file: upright width and height in pixels, whether its colours are
    a guess, and whether it is an animation.

    It is decoded once, as cheaply as the format allows. Raises DataError as `open_rgb` does.
    """
    image = _open(path, data, max_pixels)
    width, height = image.size
    moves = _is_animation(image)
    try:
        image.draft(None, (min(width, CHECK_SIDE), min(height, CHECK_SIDE)))
        image.load()
    except Exception as error:  # see open_rgb
        raise DataError(f"{path}: {_reason(error)}") from error
    if image.format == "TIFF":  # Pillow turns TIFFs by itself, size and all
        width, height = image.size
    elif _orientation(image) in QUARTER_TURNS:
        width, height = height, width
    return (width, height), colour.is_a_guess(image), moves


def _is_animation(image: ImageFile.ImageFile) -> bool:
    """Whether frames follow that aren't trained; further pages and thumbnails (TIFF, MPO) are none."""
    try:
        return image.format in ANIMATED and bool(getattr(image, "is_animated", False))
    except Exception:  # a second frame that is damaged, which nobody looks at
        return True


@contextmanager
def file_bytes(path: Path) -> Iterator[bytes]:
    """The bytes of an image's file, once there is memory to decode it beside what other threads hold.

    Raises DataError if it can't be read.
    """
    with ExitStack() as stack:
        try:
            require_size(path, FILE_BYTES)
            file = stack.enter_context(open(path, "rb"))
            stack.enter_context(_room.taken_for(_weight(file)))
            data = file.read()
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror})") from error
        yield data


class _Room:
    """Pixels that are in memory right now, of all threads: many small images, or a large one alone."""

    def __init__(self) -> None:
        self._changed, self._taken = threading.Condition(), 0

    @contextmanager
    def taken_for(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + pixels <= PIXELS_AT_ONCE)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


_room = _Room()


def _weight(file: BinaryIO) -> int:
    """An image's pixels by its header, or a quarter of its bytes where that is more. The file stands at its start."""
    stored = os.fstat(file.fileno()).st_size // 4
    try:
        with _pillow_limits():
            return max(stored, math.prod(Image.open(file, formats=FORMATS).size))
    except Exception:  # what is wrong with it is said where it is decoded
        return stored
    finally:
        file.seek(0)


def resize_and_crop(image: Image.Image, bucket: Bucket) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The centre of an upright image resized to a bucket, and that crop (left, top, width, height) in its own pixels.

    Lanczos over the whole area that an output pixel covers, so that reducing doesn't alias.
    """
    left, top, width, height = crop = centre_crop(*image.size, bucket)
    box = (left, top, left + width, top + height)
    return image.resize(bucket, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0), crop


def report_bad(problems: Sequence[str], *, skip: bool) -> None:
    """All unreadable images at once: a warning each if they may be skipped. Raises DataError otherwise."""
    if not problems:
        return
    if not skip:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise DataError(
            f"{plural(len(problems), 'unreadable image')}; fix or remove what is listed, or skip it with "
            f"data.skip_bad=true:{listed}"
        )
    for problem in problems:
        say(f"warning: left out {problem}")


def _open(path: Path, data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """The header only; the size is checked here."""
    if not data:
        raise DataError(f"{path}: is empty (0 bytes)")
    try:
        with _pillow_limits():
            image = Image.open(io.BytesIO(_texts_first(data)), formats=FORMATS)
    except Exception as error:  # see open_rgb
        reason = HEIC_REASON if _is_heic(data) else _reason(error)
        raise DataError(f"{path}: {reason}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{path}: {width} x {height} pixels are more than data.max_pixels={max_pixels}; "
            f"make it smaller or try data.max_pixels={width * height}"
        )
    colour.note(image)
    if refusal := code_points.refusal(image.info.get(code_points.KEY)):
        raise DataError(f"{path}: {refusal}")
    return image


@contextmanager
def _pillow_limits() -> Iterator[None]:
    """Pillow's own limit of pixels would hide the size from the message and could not be raised; ours replaces it. Its
    limits of text refuse good images that carry their whole history as XMP, and large colour profiles."""
    with _pillow_limit:
        pixels, texts = Image.MAX_IMAGE_PIXELS, {name: getattr(PngImagePlugin, name) for name in TEXT_LIMITS}
        try:
            Image.MAX_IMAGE_PIXELS = None
            for name, limit in TEXT_LIMITS.items():
                setattr(PngImagePlugin, name, limit)
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = pixels
            for name, limit in texts.items():
                setattr(PngImagePlugin, name, limit)


def _texts_first(data: bytes) -> bytes:
    """A PNG whose texts stand before its pixels: Pillow then reads them when it opens the file, under our limits."""
    if not data.startswith(PNG):
        return data
    pixels, start, texts = 0, len(PNG), []
    while start + 12 <= len(data):  # length, name, content, checksum
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        name = data[start + 4 : start + 8]
        if name == b"IDAT":
            pixels = pixels or start
        elif name in TEXT_CHUNKS and pixels and end <= len(data):
            texts.append((start, end))
        start = end
    if not texts:
        return data
    moved = b"".join(data[start:end] for start, end in texts)
    ends = [*(start for start, _ in texts), len(data)]
    rest = [data[start:end] for start, end in zip([pixels, *(end for _, end in texts)], ends, strict=True)]
    return b"".join([data[:pixels], moved, *rest])


def _is_heic(data: bytes) -> bool:
    """As phones write it, also under the name of a JPEG: heic, heix, … among its brands (ISO/IEC 23008-12, annex B)."""
    return data[4:8] == b"ftyp" and b"hei" in data[8:64]


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image in any of these formats: {', '.join(FORMATS)}"
    if isinstance(error, MemoryError):
        return "takes more memory than there is; close other programs, or make the image smaller"
    text = " ".join(str(error).split())
    if "truncated" in text:
        return f"is truncated ({text}); the rest of the file is missing"
    return f"is corrupt ({text or type(error).__name__})"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken EXIF block doesn't make the image unusable
        return 1


def _upright(image: Image.Image) -> Image.Image:
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _low_bytes(image: ImageFile.ImageFile, again: Callable[[], ImageFile.ImageFile]) -> Image.Image | None:
    """The low bytes of the colours of an image of 16 bits a channel, of which Pillow keeps the high ones.

    None where 8 bits are enough: for an image in sRGB without a colour that is see-through. image: not decoded yet.
    again: opens it once more.
    """
    rawmodes = {tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0] for tile in image.tile}
    rawmode = str(rawmodes.pop()) if len(rawmodes) == 1 else ""
    mode, _, order = rawmode.partition(";16")
    grey = rawmode == GREY_ALPHA
    if not (grey or (mode in ("RGB", "RGBA", "CMYK") and order in OTHER_ORDER)):
        return None
    is_needed = colour.is_needed(colour.profile_of(image), "L" if grey else mode.removesuffix("A"))
    if not (is_needed or "transparency" in image.info):
        return None
    # With the bytes in the other order the same decoder keeps the low ones. Of grey with alpha all four are taken.
    exchanged = "RGBA" if grey else f"{mode};16{OTHER_ORDER[order]}"
    low = again()
    low.tile = [
        tile._replace(args=exchanged if isinstance(tile.args, str) else (exchanged, *(tile.args or ())[1:]))
        for tile in low.tile
    ]
    low.load()
    upright = _upright(low)
    return upright.getchannel("G") if grey else upright.convert(mode.removesuffix("A"))


def _rgb(image: Image.Image, low: Image.Image | None) -> Image.Image:
    profile, see_through = colour.profile_of(image), image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values_HW = np.asarray(image)
        if colour.is_needed(profile, "L"):
            high, low = Image.fromarray((values_HW >> 8).astype(np.uint8)), Image.fromarray(values_HW.astype(np.uint8))
            shown = colour.to_srgb(high, profile, low)
        else:
            shown = colour.to_srgb(_eight_bits(image), None)
        return shown if see_through is None else _white_where(values_HW == see_through, shown)
    if image.mode in ("I", "F"):
        return colour.to_srgb(_eight_bits(image), profile)
    if image.mode == "RGB" and low is not None and see_through is not None:  # Pillow would compare 8 bits
        is_gone_HW = (colour.values_of(image, low) == see_through).all(axis=2)
        return _white_where(is_gone_HW, colour.to_srgb(image, profile, low))
    if image.has_transparency_data:
        return _on_white(image, profile, low)
    if image.mode not in colour.SPACES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    return colour.to_srgb(image, profile, low)


def _white_where(is_gone_HW: np.ndarray, image: Image.Image) -> Image.Image:
    image.paste("white", mask=Image.fromarray(is_gone_HW))
    return image


def _on_white(image: Image.Image, profile: colour.Profile | None, low: Image.Image | None) -> Image.Image:
    """The colour profile belongs to the colours; alpha is not a colour."""
    coloured = image.convert("RGBA")
    grey = image.getbands()[0] in ("L", "1") or (low is not None and low.mode == "L")
    white = Image.new("RGB", image.size, "white")
    opaque = colour.to_srgb(coloured.getchannel("R") if grey else coloured.convert("RGB"), profile, low)
    white.paste(opaque, mask=coloured.getchannel("A"))
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 or 32 bits or floats as 8 bits: by the type's range, never clipped."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(SIXTEEN_TO_EIGHT[np.asarray(image)])
    values_HW = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)
    top = float(values_HW.max())
    if image.mode == "I":  # 16 bits in a wider type, or full 32 bits
        scale = 255 / max(top, 65535.0)
    else:  # floats carry no range: 0…1 and 0…255 are the two customs, anything else is stretched to its own maximum
        scale = 255.0 if top <= 1.0 else 1.0 if top <= 255.0 else 255.0 / top
    return Image.fromarray(np.clip(values_HW * scale + 0.5, 0, 255).astype(np.uint8))
