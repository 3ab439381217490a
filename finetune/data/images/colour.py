"""Colours as a colour-managed viewer shows them on an sRGB screen: through an embedded ICC profile (ICC.1:2022), or
through what a PNG, an AVIF or a camera's EXIF says instead of one.

H×W pixels, C channels of the image.
"""

import io
import itertools
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageFile

from finetune.data.images import camera, code_points, gamma

SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # a profile for another kind of image is passed over
SAME = 2  # of 255; profiles that change no colour by more are sRGB, whatever they are called
LEVELS = (0, 1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 255)  # of the patches by which that is judged
ROWS = 64  # of a 16-bit image at a time: up to sixteen float copies of them are held

Profile = bytes | gamma.Gamma


def note(image: ImageFile.ImageFile) -> None:
    """Puts what a file says of its colours, and Pillow doesn't read, into an opened image's info, before it is decoded
    and turned."""
    code_points.note(image)
    camera.note(image)


def profile_of(image: Image.Image) -> Profile | None:
    """What an opened image says of its colours; None for sRGB as well as for nothing."""
    said = image.info
    if points := said.get(code_points.KEY):
        return code_points.encoding(points)
    if profile := said.get("icc_profile"):
        return bytes(profile)
    return gamma.of(said) if {"gamma", "srgb"} & said.keys() else said.get(camera.KEY)


def is_a_guess(image: Image.Image) -> bool:
    """Whether programs show an image differently: inks without a profile that says how they look."""
    return image.mode == "CMYK" and not is_needed(profile_of(image), image.mode)


def to_srgb(image: Image.Image, profile: Profile | None, low: Image.Image | None = None) -> Image.Image:
    """An L, RGB or CMYK image in sRGB. Without a profile, or with a broken one, by Pillow's plain conversion.

    low: the low bytes of an image of 16 bits, whose high bytes are `image`.
    """
    if not is_needed(profile, image.mode):
        return image if image.mode == "RGB" else image.convert("RGB")  # large images are not copied
    assert profile is not None
    if isinstance(profile, gamma.Gamma):
        return _in_parts(values_of(image, low), profile.shown).convert("RGB")
    if image.mode == "L":
        return Image.fromarray(_grey_table(profile)[values_of(image, low)])
    transform = _transform(profile, image.mode)
    assert transform is not None
    if low is None:
        return transform.apply(image)
    # Pillow's transforms take 8 bits: the colours of the 2^C nearest ones are interpolated.
    return _in_parts(values_of(image, low), lambda values_HWC: _interpolated(values_HWC, image.mode, transform))


@lru_cache(maxsize=32)
def is_needed(profile: Profile | None, mode: str) -> bool:
    """Whether the profile fits the mode and changes colours at all; its name is not asked."""
    if isinstance(profile, gamma.Gamma):
        return mode != "CMYK"
    transform = _transform(profile, mode) if profile else None
    if transform is None or mode == "CMYK":
        return transform is not None
    channels = 3 if mode == "RGB" else 1
    patches_NC = np.array(list(itertools.product(LEVELS, repeat=channels)), dtype=np.uint8)
    patches = Image.fromarray(patches_NC[None] if mode == "RGB" else patches_NC)
    moved = np.asarray(transform.apply(patches)).astype(int) - np.asarray(patches.convert("RGB"))
    return bool(np.abs(moved).max() > SAME)


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None for a profile that is broken or for another kind of image."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != SPACES.get(mode):
            return None
        # Little CMS would put grey curves through 33 points: too few for linear grey.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        target = _srgb()
        return ImageCms.ImageCmsTransform(source, target, mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@lru_cache(maxsize=32)
def _grey_table(profile: bytes) -> np.ndarray:
    """The colour of each grey of 16 bits, (65536, 3) uint8."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    target = _srgb()
    transform = ImageCms.ImageCmsTransform(source, target, "I;16", "RGB", flags=ImageCms.Flags.NOOPTIMIZE)
    greys = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    return np.asarray(transform.apply(greys)).reshape(65536, 3)


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def values_of(image: Image.Image, low: Image.Image | None) -> np.ndarray:
    """Of 16 bits, (H, W) for grey and (H, W, C) for colours; 8 bits are scaled up."""
    high_HWC = np.asarray(image).astype(np.uint16) * 256
    values_HWC: np.ndarray = high_HWC + np.asarray(image if low is None else low)
    return values_HWC


def _in_parts(values_HWC: np.ndarray, shown: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    parts = [shown(values_HWC[row : row + ROWS]) for row in range(0, len(values_HWC), ROWS)]
    return Image.fromarray(np.concatenate(parts))


def _interpolated(values_HWC: np.ndarray, mode: str, transform: ImageCms.ImageCmsTransform) -> np.ndarray:
    below_HWC, rest_HWC = np.divmod(values_HWC, 257)  # 65535 / 255
    share_HWC = rest_HWC.astype(np.float32) / 257
    total_HW3 = np.zeros((*values_HWC.shape[:2], 3), np.float32)
    for corner_C in itertools.product((0, 1), repeat=values_HWC.shape[2]):
        weight_HW = np.where(corner_C, share_HWC, 1 - share_HWC).prod(axis=2)
        colours_HWC = np.minimum(below_HWC + np.array(corner_C, np.uint16), 255).astype(np.uint8)
        corner = Image.frombytes(mode, colours_HWC.shape[1::-1], colours_HWC.tobytes())
        total_HW3 += weight_HW[..., None] * np.asarray(transform.apply(corner))
    return np.round(total_HW3).astype(np.uint8)
