"""ICC profiles made by hand, and the colours that they mean, computed without a colour management system."""

import struct
import zlib

import numpy as np

Colours = np.ndarray  # (…, channels), 0 … 1

# Columns: what red, green and blue are in XYZ under D50. sRGB: IEC 61966-2-1; the other: Adobe RGB (1998), §4.3.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
D50 = np.array([0.9642, 1.0, 0.8249])
# Of an invented press: L*, a* and b* of bare paper, and what a full share of each of four inks changes.
PAPER = np.array([100.0, 0.0, 0.0])
INKS = np.array([[-20.0, -12.0, -14.0], [-25.0, 20.0, -4.0], [-10.0, -4.0, 24.0], [-45.0, 0.0, 0.0]])


def rgb_profile(primaries: np.ndarray, gamma: float, *, name: str = "sRGB") -> bytes:
    """A matrix profile; its name says nothing about it."""
    tags = {f"{c}XYZ": b"XYZ \0\0\0\0" + xyz(primaries[:, i]) for i, c in enumerate("rgb")}
    return profile("mntr", "RGB ", "XYZ ", tags | {f"{c}TRC": curve(gamma) for c in "rgb"}, name)


def grey_profile(gamma: float, *, name: str = "sRGB") -> bytes:
    return profile("mntr", "GRAY", "XYZ ", {"kTRC": curve(gamma)}, name)


def cmyk_profile() -> bytes:
    """Sixteen mixtures of full inks in L*a*b*; all others lie between them."""
    shares = np.array([[c, m, y, k] for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)])
    lab = PAPER + shares @ INKS
    encoded = np.stack([lab[:, 0] / 100 * 65280, (lab[:, 1] + 128) * 256, (lab[:, 2] + 128) * 256], axis=1)
    straight = struct.pack(">HH", 0, 65535)
    table = b"mft2\0\0\0\0" + bytes([4, 3, 2, 0]) + b"".join(fixed(v) for v in np.eye(3).ravel())
    table += struct.pack(">HH", 2, 2) + straight * 4 + np.round(encoded).astype(">u2").tobytes() + straight * 3
    return profile("scnr", "CMYK", "Lab ", {"A2B0": table}, "press")


def rgb_shown(values: Colours, primaries: np.ndarray, gamma: float) -> Colours:
    return to_srgb(values**gamma @ primaries.T)


def grey_shown(values: Colours, gamma: float) -> Colours:
    return to_srgb(values**gamma * D50)


def cmyk_shown(values: Colours) -> Colours:
    lightness, a, b = np.moveaxis(PAPER + values @ INKS, -1, 0)
    y = (lightness + 16) / 116
    cubes = np.stack([y + a / 500, y, y - b / 200], axis=-1)
    return to_srgb(np.where(cubes > 6 / 29, cubes**3, (cubes - 4 / 29) * 108 / 841) * D50)


def to_srgb(xyz_D50: Colours) -> Colours:
    """Of an sRGB screen, 0 … 255; colours beyond it are cut off."""
    linear = np.clip(xyz_D50 @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def png(values: np.ndarray, bits: int, icc: bytes, *, said: bytes = b"", extra: bytes = b"") -> bytes:
    """An unfiltered PNG of (H, W, 1 … 4 channels); Pillow can't write 16 bits a channel. extra: chunks at its end.
    said: chunks about its colours."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in values)
    profile_chunk = chunk(b"iCCP", b"profile\0\0" + zlib.compress(icc)) if icc else b""
    body = chunk(b"IHDR", header) + said + profile_chunk + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + extra + chunk(b"IEND", b"")


def gamma_chunk(gamma: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(gamma * 100000)))


def chromaticities_chunk(xy: tuple[float, ...]) -> bytes:
    """xy: of white, red, green and blue."""
    return chunk(b"cHRM", struct.pack(">8I", *(round(value * 100000) for value in xy)))


def tiff(values: np.ndarray, icc: bytes, *, order: str, deflate: bool) -> bytes:
    """A TIFF of 16 bits a channel, (H, W, 3 or 4), RGB or CMYK, in one strip. order: "<" or ">"."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    pixels = zlib.compress(pixels) if deflate else pixels
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    start = 8 + 2 + 12 * 10 + 4
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, start), (259, 3, 1, 8 if deflate else 1)]
    tags += [(262, 3, 1, 2 if channels == 3 else 5), (273, 4, 1, start + len(bits) + len(icc)), (277, 3, 1, channels)]
    tags += [(278, 3, 1, height), (279, 4, 1, len(pixels)), (34675, 7, len(icc), start + len(bits))]
    entries = b""
    for tag, kind, count, value in tags:
        inline = "HH" if kind == 3 and count == 1 else "I"
        entries += struct.pack(f"{order}HHI{inline}", tag, kind, count, *([value, 0] if inline == "HH" else [value]))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return head + entries + bytes(4) + bits + icc + pixels


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def profile(device: str, space: str, connection: str, tags: dict[str, bytes], name: str) -> bytes:
    """An ICC profile of version 2.4 (ICC.1:2001-04, §6)."""
    text = name.encode() + b"\0"
    tags = {
        "desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        "cprt": b"text\0\0\0\0free\0",
        "wtpt": b"XYZ \0\0\0\0" + xyz(D50),
        **tags,
    }
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        table += tag.encode() + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI", offset + len(body), b"lcms", 0x02400000) + f"{device}{space}{connection}".encode()
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def xyz(values: np.ndarray) -> bytes:
    return b"".join(fixed(value) for value in values)


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(float(value) * 65536))
