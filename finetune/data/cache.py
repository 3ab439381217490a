"""Encoded examples on disk, found by content: a key hashes everything the entry depends on, never a path or a time.

One safetensors file per key (`ab/abcdef….safetensors`), so entries are shared between runs, read memory-mapped, and
the folder may be deleted at any time.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from finetune.errors import DataError, RunError
from finetune.reading import damage
from finetune.run.atomic import remove_abandoned
from finetune.run.hashing import Stamp, stamp_of

HEADER_BYTES = 8 + 65536  # more than the length and header of an entry take: it has a handful of tensors


class Cache:
    """A folder of entries. Several processes may use it at once: entries appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def remove_abandoned(self) -> None:
        """Remove what killed processes left half written."""
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            remove_abandoned(folder, "[0-9a-f]{64}")

    def path(self, key: str) -> Path:
        """Where the entry of a key lies or would lie."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the entry is there and whole, by checksum; a damaged one is removed, to be made again."""
        path = self.path(key)
        try:
            whole = _is_whole(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise RunError(f"cannot read {path} ({error.strerror}); delete the cache folder {self.folder}") from error
        if whole:
            return True
        path.unlink(missing_ok=True)
        return False

    def notes(self, key: str) -> dict[str, str]:
        """The texts that were stored with the entry."""
        with open(self.path(key), "rb") as file:
            return _notes(file.read(HEADER_BYTES))

    def put(self, key: str, tensors: Mapping[str, Tensor], **notes: str) -> Path:
        """Store tensors (any shapes, CPU) and texts under a key. Raises RunError where the folder can't be written."""
        plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        body = _body(save(plain))
        data = save(plain, metadata={**notes, "checksum": hashlib.sha256(body).hexdigest()})
        path = self.path(key)
        temporary = path.with_name(f".{key}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not flushed to disk: after a power cut the checksum finds a half-written entry, and it is made again.
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise RunError(
                f"cannot write the cache {self.folder} ({error.strerror}); free the disk or try data.cache=FOLDER"
            ) from error
        return path


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of an entry, memory-mapped. Raises DataError if it is missing or damaged; then it is removed."""
    try:
        if not _was_whole(path, stamp_of(path)):
            path.unlink()
            raise DataError(f"cached example {path} was damaged; the same command encodes it again")
        with safe_open(path, framework="pt") as entry:
            return {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError) as error:
        raise DataError(f"cached example {path} can't be read ({error}); the same command encodes it again") from error


@cache  # training reads each entry over and over
def _was_whole(path: Path, stamp: Stamp) -> bool:
    """`_is_whole` for a file that has had this stamp since."""
    return _is_whole(path)


def _is_whole(path: Path) -> bool:
    """Whether a file has the content that was stored. Raises OSError."""
    if damage(path):  # also of a length that no memory holds
        return False
    data = path.read_bytes()
    return _checksum(data) == _notes(data).get("checksum", "")


def missing(paths: Iterable[Path]) -> bool:
    """Whether any of these entries is gone (someone deleted the cache)."""
    return not all(path.is_file() for path in paths)


def _notes(data: bytes) -> dict[str, str]:
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return dict(header.get("__metadata__", {}))
    except (ValueError, AttributeError, TypeError):
        return {}


def _body(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]


def _checksum(data: bytes) -> str:
    return hashlib.sha256(_body(data)).hexdigest()
