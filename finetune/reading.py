"""What is looked at before a file is read: whether it is one, its size, and the header of weights."""

import errno
import json
import os
import stat
from pathlib import Path

from finetune.errors import ModelError

MOST_BYTES = 64 << 20  # of a text that is read as one: recipes, captions, templates, configurations take kilobytes
HEADER_LIMIT_BYTES = 100 << 20  # the safetensors format's own limit
TEXTS = (".json", ".txt", ".model", ".jinja")  # a model's configurations and vocabularies
ARCHIVES = (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".zst", ".7z", ".rar")


def at_home(path: str) -> Path:
    """A path with the home folder in place of `~`; of a user that there isn't it stays, as in a shell."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_there(path: Path) -> bool:
    """Whether a path leads somewhere, as far as this user may look."""
    try:
        return path.exists()
    except OSError:  # a folder above is closed, or the path is too long
        return False


def read_text(path: Path) -> str:
    """A text file in UTF-8. Raises OSError, also for one that is too large to be what it should be, and ValueError."""
    require_size(path, MOST_BYTES)
    return path.read_text(encoding="utf-8")


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises OSError, also for what is no file."""
    require_file(path)
    return path.read_bytes()


def require_file(path: Path) -> None:
    """Raises OSError for what isn't there, and for what has no end or is there only once: a pipe, socket or device."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder says what it is
        raise OSError(errno.EINVAL, "it is a pipe, socket or device, and no file", str(path))


def require_size(path: Path, most: int) -> None:
    """Raises OSError for a file of more bytes, for what is no file, and for what isn't there."""
    require_file(path)
    if path.stat().st_size > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))


def damage(file: Path) -> str:
    """What is wrong with a safetensors file (its header or its length); empty if nothing shows without reading all."""
    from safetensors import SafetensorError, safe_open

    try:
        require_file(file)
    except OSError as error:
        return error.strerror or str(error)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
            return f"{size} bytes without a safetensors header"
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            if size != 8 + length + end:
                return f"{size} bytes where its header says {8 + length + end}"
            with safe_open(file, "pt"):  # checks types, shapes and that no tensors overlap
                return ""
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, SafetensorError):
            return "its safetensors header is unreadable"


def what_is_wrong(file: Path) -> str:
    """With weights, or with a configuration or vocabulary that is too large to be one; empty if nothing shows."""
    if file.suffix == ".safetensors":
        return damage(file)
    if file.suffix in TEXTS and file.is_file() and file.stat().st_size > MOST_BYTES:
        return f"{file.stat().st_size} bytes are too many for it"
    return ""


def require_whole(*files: Path) -> None:
    """Raises ModelError for damaged weights, and for a configuration or vocabulary that is too large to be one."""
    for file in files:
        if wrong := what_is_wrong(file):
            raise ModelError(f"{file} is damaged ({wrong}); copy or download it again")
