"""Images from disk as upright 8-bit RGB, whatever they are stored as, and cut to a bucket.

No decoder is run before the size is known to be allowed, and only decoders of ordinary image formats are ever used.
"""

import io
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from finetune.data.images.buckets import Bucket, centre_crop
from finetune.errors import DataError
from finetune.run.progress import say

# Named, because Pillow would otherwise hand an EPS that is called .png to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "TGA")
ORIENTATION = 0x0112  # EXIF tag (Exif 2.32, §4.6.4)
QUARTER_TURNS = (5, 6, 7, 8)  # orientations that exchange width and height
SIXTEEN_TO_EIGHT = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257, rounded
CHECK_SIDE = 512  # pixels; JPEGs are checked at a reduced size, which still reads every byte
_pillow_limit = threading.Lock()


def open_rgb(path: Path, max_pixels: int) -> Image.Image:
    """The image upright in RGB, 8 bits: rotated as EXIF says, colour profile applied, transparency on white, 16 bits
    scaled down, first frame of an animation.

    Raises DataError naming the file and the reason if it is missing, empty, corrupt, truncated, or has more than
    `max_pixels` pixels (seen before anything is decoded).
    """
    image = _open(path, read_bytes(path), max_pixels)
    try:
        image.load()
        return _rgb(_upright(image))
    except Exception as error:  # decoders raise whatever they like at broken data
        raise DataError(f"{path}: {_reason(error)}") from error


def upright_size(path: Path, data: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels of an image that decodes, from the bytes of its file.

    It is decoded once, as cheaply as the format allows. Raises DataError as `open_rgb` does.
    """
    image = _open(path, data, max_pixels)
    width, height = image.size
    try:
        image.draft(None, (min(width, CHECK_SIDE), min(height, CHECK_SIDE)))
        image.load()
    except Exception as error:  # see open_rgb
        raise DataError(f"{path}: {_reason(error)}") from error
    if image.format == "TIFF":  # Pillow turns TIFFs by itself, size and all
        return image.size
    return (height, width) if _orientation(image) in QUARTER_TURNS else (width, height)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. Raises DataError if it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error


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
            f"{len(problems)} unreadable images; fix or remove them, or skip them with data.skip_bad=true:{listed}"
        )
    for problem in problems:
        say(f"warning: left out {problem}")


def _open(path: Path, data: bytes, max_pixels: int) -> Image.Image:
    """The header only; the size is checked here."""
    if not data:
        raise DataError(f"{path}: is empty (0 bytes)")
    try:
        # Pillow's own limit would hide the size from the message and could not be raised; ours replaces it.
        with _pillow_limit:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except Exception as error:  # see open_rgb
        raise DataError(f"{path}: {_reason(error)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{path}: {width} x {height} pixels are more than data.max_pixels={max_pixels}; "
            f"make it smaller or try data.max_pixels={width * height}"
        )
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image in any of these formats: {', '.join(FORMATS)}"
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
    if _orientation(image) == 1:
        return image
    profile = image.info.get("icc_profile")
    turned = ImageOps.exif_transpose(image)
    turned.info["icc_profile"] = profile
    return turned


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        # The colour profile belongs to RGB; alpha is not a colour.
        opaque = _to_srgb(coloured.convert("RGB"), image.info.get("icc_profile"))
        white = Image.new("RGB", image.size, "white")
        white.paste(opaque, mask=coloured.getchannel("A"))
        return white
    if image.mode == "P":
        image, profile = image.convert("RGB"), image.info.get("icc_profile")
        return _to_srgb(image, profile)
    return _to_srgb(image, image.info.get("icc_profile")).convert("RGB")


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


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours through the embedded ICC profile; without one, or with a broken one, Pillow's plain conversion."""
    if not profile or image.mode not in ("RGB", "CMYK", "L"):
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return converted if converted is not None else image.convert("RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB")
