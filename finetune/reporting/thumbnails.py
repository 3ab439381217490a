"""Images as data URIs: upright, on white, no larger than they are shown."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from finetune.data.images import decode
from finetune.reading import require_file

LOSSLESS_SIDE = 160  # pixels; up to here a PNG is small, and JPEG would show its blocks
JPEG_QUALITY = 86

NOT_SHOWN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What reading a damaged image may raise; UnidentifiedImageError is an OSError."""


def image_html(file: Path, side: int, described: str) -> str:
    """An <img> with the image inside, or what is missing in words."""
    uri = data_uri(file, side)
    if uri is None:
        return f"<em>{escape(file.name)} can't be shown</em>"
    return f'<img src="{uri}" alt="{escape(described, quote=True)}" style="max-width:100%">'


def data_uri(file: Path, side: int) -> str | None:
    """The image, upright and at most `side` pixels wide and high, as a data URI; None if it can't be read."""
    try:
        require_file(file)
    except OSError:
        return None
    return encoded(file, side)


def encoded(source: Path | BinaryIO, side: int) -> str | None:
    """The same of a file that is known to be one, or of its content."""
    try:
        with Image.open(source) as opened:
            opened.draft("RGB", (side, side))  # JPEGs are decoded at a reduced size: ten times as fast
            image = decode.shown(opened)
    except NOT_SHOWN:
        return None
    kind = "png" if max(image.size) <= min(side, LOSSLESS_SIDE) else "jpeg"
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, kind, quality=JPEG_QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def fitting(files: Sequence[Path], sides: Sequence[int], budget_bytes: int) -> dict[Path, str | None]:
    """Every image as a data URI, at the largest of `sides` with which all fit the budget, or else the smallest."""
    for side in sides:
        uris = {file: data_uri(file, side) for file in files}
        if sum(len(uri) for uri in uris.values() if uri) <= budget_bytes:
            break
    return uris
