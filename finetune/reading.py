"""Small files of a person's, read as a whole."""

import errno
import os
from pathlib import Path

MOST_BYTES = 64 << 20  # of a text that is read as one: recipes, captions, templates, configurations take kilobytes


def read_text(path: Path) -> str:
    """A text file in UTF-8. Raises OSError, also for one that is too large to be what it should be, and ValueError."""
    require_size(path, MOST_BYTES)
    return path.read_text(encoding="utf-8")


def require_size(path: Path, most: int) -> None:
    """Raises OSError for a file of more bytes, or one that isn't there."""
    if path.stat().st_size > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
