"""What stages, cache entries and checkpoints are known by: sha256, in hexadecimal digits."""

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.errors import ModelError, RunError
from finetune.reading import read_bytes, require_file, what_is_wrong
from finetune.run.atomic import write_atomically

# A file that is written twice within one tick of the file system's clock shows the same times (git calls it "racy").
# Times this close to the moment of reading are not trusted. FAT counts in steps of 2 s, all others are finer.
RACY_NS = 2 * 10**9

Stamp = tuple[int, ...]
"""A file's bytes, modification time and change time in ns. The last one catches what keeps the second (`cp -p`,
`touch -r`). Inode numbers would catch no more and differ at each mount of some network file systems."""


def hash_of(*values: Any) -> str:
    """Hash of plain values; equal values hash equally whatever the order of dictionary keys.

    Names of files that are not UTF-8 are text with half surrogates.
    """
    return hashlib.sha256(
        json.dumps(values, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()


def hash_file(path: Path) -> str:
    """Hash of a file's content. Raises OSError where it can't be read."""
    require_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """Hash of the contents of files in this order, whatever they are called. Raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(hash_file(path)))
    return digest.hexdigest()


def hash_adapter(path: Path) -> str:
    """Content of an adapter, a file or a folder; of a path that isn't there, which its loader reports, of nothing.

    Raises ModelError for a file whose header or length is wrong, before all of it is read.
    """
    found = sorted([*path.rglob("*.safetensors"), *path.rglob("adapter_config.json")]) if path.is_dir() else [path]
    files = [file for file in found if file.is_file()]
    for file in files:
        if wrong := what_is_wrong(file):
            raise ModelError(f"{file} is damaged ({wrong}); export it again or restore it from a copy")
    return hash_files(files)


def stamp_of(path: Path) -> Stamp:
    """Today's stamp of a file. Raises OSError where there is none."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def trusted(stamp: Stamp, read_ns: int) -> bool:
    """Whether a file that was read at that time, ns, and has this stamp still is the file that was read."""
    return max(stamp[1:]) < read_ns - RACY_NS


def known_hash(path: Path, memory: Path) -> str:
    """`hash_file` of a large file, which is read again only if its size or one of its times has changed.

    memory: the JSON file that remembers; it only saves work and may be deleted at any time. Raises OSError.
    """
    path, known = path.resolve(), _remembered(memory)
    stamp, now = stamp_of(path), time.time_ns()
    before = known.get(str(path))
    if before and tuple(before[0]) == stamp:
        return str(before[1])
    sha256 = hash_file(path)
    if trusted(stamp, now):
        rows = {file: row for file, row in known.items() if Path(file).is_file()} | {str(path): [stamp, sha256]}
        with suppress(RunError):  # the next run reads the file again, that is all
            write_atomically(memory, json.dumps([hash_of(rows), rows]))
    return sha256


def _remembered(memory: Path) -> dict[str, list[Any]]:
    """Path -> stamp and hash; none where nothing is remembered or the file is damaged."""
    try:
        checksum, rows = json.loads(read_bytes(memory))
    except (OSError, ValueError, TypeError):
        return {}
    return dict(rows) if checksum == hash_of(rows) else {}
