"""Colours as code points of ITU-T H.273: the chunk cICP of a PNG (PNG, third edition, §11.3.2.6), which counts before a
profile, and the box colr of an AVIF (ISO/IEC 14496-12, §12.1.5), which counts where there is no profile."""

from collections.abc import Mapping
from typing import IO, Any

from PIL import ImageFile

from finetune.data.images.gamma import SRGB_CURVE, SRGB_XY, Gamma

PNG = b"\x89PNG\r\n\x1a\n"
KEY = "code points"  # of an opened image's info
UNSPECIFIED = 2
AVIF_BOXES = 64 * 1024  # bytes, of the boxes that stand before the pixels
D65, ILLUMINANT_C = SRGB_XY[:2], (0.310, 0.316)
BT601_525 = (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070)
# Chromaticities of white, red, green and blue (H.273, table 2).
PRIMARIES: dict[int, tuple[float, ...]] = {
    1: SRGB_XY,
    UNSPECIFIED: SRGB_XY,
    4: (*ILLUMINANT_C, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: BT601_525,
    7: BT601_525,
    8: (*ILLUMINANT_C, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (*D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
# Curves (H.273, table 3) as browsers show them: a camera's, of BT.709 and its like, as a screen's of BT.1886.
VIDEO = (1, 6, 11, 14, 15)
CURVES: dict[int, float] = {4: 1 / 2.2, 5: 1 / 2.8, 8: 1.0, 13: SRGB_CURVE, **dict.fromkeys(VIDEO, 1 / 2.4)}
HDR = {16: "PQ", 18: "HLG"}

CodePoints = tuple[int, int, bool]  # primaries, curve, and whether values have their full range


def note(image: ImageFile.ImageFile) -> None:
    """Puts what an image says into its info, where Pillow puts what it knows of its colours. It is not decoded yet."""
    file = image.fp
    if file is None or image.format not in ("PNG", "AVIF"):
        return
    position = file.tell()
    points = _of_png(file) if image.format == "PNG" else _of_avif(file, image.info)
    file.seek(position)
    if points and points[1] != UNSPECIFIED:
        image.info[KEY] = points


def encoding(points: CodePoints) -> Gamma | None:
    """How the values of such an image were encoded; None for sRGB, and for what can't be shown on its screens."""
    primaries, curve, _ = points
    if refusal(points) or (PRIMARIES[primaries], CURVES[curve]) == (SRGB_XY, SRGB_CURVE):
        return None
    return Gamma(CURVES[curve], PRIMARIES[primaries])


def refusal(points: CodePoints | None) -> str | None:
    """Why such an image can't be shown on an sRGB screen; None if it can."""
    if points is None:
        return None
    primaries, curve, is_full = points
    if curve in HDR:
        return f"is an HDR image ({HDR[curve]}); save it as an sRGB image"
    if curve not in CURVES or primaries not in PRIMARIES or not is_full:
        said = f"primaries {primaries}, transfer {curve}, {'full' if is_full else 'narrow'} range"
        return f"has colours that can't be converted ({said}); save it as an sRGB image"
    return None


def _of_png(file: IO[bytes]) -> CodePoints | None:
    file.seek(len(PNG))
    while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"cICP" and length == 4 and len(said := file.read(4)) == 4:
            return said[0], said[1], bool(said[3])
        file.seek(length + 4, 1)  # and its checksum
    return None


def _of_avif(file: IO[bytes], info: Mapping[Any, Any]) -> CodePoints | None:
    """Pillow decodes narrow ranges. A camera's curve is shown as sRGB by viewers of AVIF."""
    file.seek(0)
    head = file.read(AVIF_BOXES)
    at = head.find(b"colrnclx") + 8
    said = head[at : at + 4]
    if at < 8 or len(said) < 4 or "icc_profile" in info:
        return None
    primaries, curve = int.from_bytes(said[:2], "big"), int.from_bytes(said[2:], "big")
    return primaries, 13 if curve in (UNSPECIFIED, *VIDEO) else curve, True
