"""Encoded examples on disk, found by content: a key hashes everything the entry depends on, never a path or a time.

One safetensors file per key (`ab/abcdef….safetensors`), so entries are shared between runs, and the folder may be
deleted at any time. Each entry holds the checksum of all that it says, and no entry is used before it was compared.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from finetune.errors import DataError, RunError
from finetune.reading import damage
from finetune.run.atomic import remove_abandoned, replace_file
from finetune.run.hashing import hash_of, stamp_of, trusted

HEADER_BYTES = 8 + 65536  # more than the length and header of an entry take: it has a handful of tensors
NOTES = "notes"  # what the metadata is called that holds the texts of an entry
CHECKSUM = "checksum"  # among them
READ_THREADS = 4  # reading and hashing release the interpreter lock
AT_ONCE = 256  # entries that a thread looks at: handing over each alone costs more than looking at it


class Cache:
    """A folder of entries. Several processes may use it at once: entries appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def remove_abandoned(self) -> None:
        """Remove what killed processes left half written."""
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            remove_abandoned(folder, r"[0-9a-f]{64}(?:\.safetensors)?")  # version 0.1 had it short

    def path(self, key: str) -> Path:
        """Where the entry of a key lies or would lie."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the entry is there and whole, by checksum; a damaged one is removed, to be made again."""
        return _is_whole(self.path(key))

    def notes(self, key: str) -> dict[str, str]:
        """The texts that were stored with the entry."""
        with open(self.path(key), "rb") as file:
            return _notes(file.read(HEADER_BYTES))

    def put(self, key: str, tensors: Mapping[str, Tensor], **notes: str) -> Path:
        """Store tensors (any shapes, CPU) and texts under a key. Raises DataError where the folder can't be written."""
        plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        # One text, because safetensors writes several in any order: equal entries are equal files.
        noted = json.dumps(notes | {CHECKSUM: _checksum(save(plain), notes)})
        data = save(plain, metadata={NOTES: noted})
        path = self.path(key)
        try:
            # Not flushed to disk: after a power cut the checksum finds a half-written entry, and it is made again.
            replace_file(path, data, durable=False)
        except OSError as error:
            raise DataError(
                f"cannot use the cache {self.folder} ({error.strerror}); free the disk, or try data.cache=FOLDER"
            ) from error
        return path


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of an entry. Raises DataError if it is missing or damaged; then it is removed."""
    reason = "it is damaged or gone"
    try:
        if _is_whole(path):
            return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        reason = str(error)
    raise DataError(f"cached example {path} can't be read ({reason}); the same command encodes it again")


def whole(paths: Iterable[str], since_ns: int) -> bool:
    """Whether all of these entries are there, and whole where they were written after that time (as `st_mtime_ns`).

    Others are compared when they are read: a command with nothing to do reads none.
    """

    def look(block: Sequence[str]) -> bool:
        found = [_is_older(path, since_ns) or _is_whole(path) for path in map(Path, block)]
        return all(found)  # and all are looked at: damaged ones are removed together

    wanted = list(paths)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return all([*pool.map(look, (wanted[first : first + AT_ONCE] for first in range(0, len(wanted), AT_ONCE)))])


def _is_older(path: Path, since_ns: int) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_size > 0 and max(found.st_mtime_ns, found.st_ctime_ns) <= since_ns


def _is_whole(path: Path) -> bool:
    """Whether an entry has the content that was stored; a damaged one is removed."""
    try:
        stamp, now = stamp_of(path), time.time_ns()
        known = hashlib.blake2b(f"{path} {stamp}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if known in _compared:
            return True
        data = b"" if damage(path) else path.read_bytes()  # damage: also a length that no memory holds
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RunError(f"cannot read {path} ({error.strerror}); delete the cache folder") from error
    notes = _notes(data)
    if notes.pop(CHECKSUM, "") != _checksum(data, notes):
        path.unlink(missing_ok=True)
        return False
    if trusted(stamp, now):
        _compared.add(known)
    return True


_compared: set[bytes] = set()
"""Entries as this process compared them, a digest of path and stamp each: training reads them over and over."""


def _notes(data: bytes) -> dict[str, str]:
    try:
        return dict(json.loads(_header(data)["__metadata__"][NOTES]))
    except (LookupError, ValueError, TypeError):
        return {}


def _checksum(data: bytes, notes: Mapping[str, str]) -> str:
    """Of the tensors of a file, their names, types and shapes, and of the texts: a changed name is damage too."""
    tensors = {name: entry for name, entry in _header(data).items() if name != "__metadata__"}
    return hashlib.sha256(hash_of(tensors, notes).encode() + data[8 + _length(data) :]).hexdigest()


def _header(data: bytes) -> dict[str, Any]:
    """Empty for what has none."""
    try:
        return dict(json.loads(data[8 : 8 + _length(data)]))
    except (ValueError, TypeError):
        return {}


def _length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")
