"""The folder of backups: `content/`, every content once under its hash, and `manifests/`, a list of files per backup.

A manifest is written last and nothing is ever replaced by other content, so a backup that is killed leaves the earlier
ones as they were, and the next one goes on from what is copied. In the order of names content comes first: whatever
copies the folder elsewhere in that order leaves no manifest without its files.
"""

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from finetune.errors import RunError
from finetune.reading import read_bytes, require_file
from finetune.run.atomic import remove_abandoned, write_atomically
from finetune.run.hashing import hash_file, hash_of
from finetune.run.outputs import Output, free_name
from finetune.run.plain import UNREADABLE, first_line, from_plain

CONTENT, MANIFESTS, LOCK = "content", "manifests", ".lock"
SHA256 = r"[0-9a-f]{64}"


@dataclass(frozen=True)
class Manifest:
    """What one backup holds. folder: the one that was backed up, on `host`. files: name, relative to that folder ->
    its content. left_out: what isn't in the backup -> why."""

    folder: str
    host: str
    files: dict[str, Output]
    left_out: dict[str, str]


@contextmanager
def opened(dest: Path) -> Iterator[None]:
    """For whoever writes: nobody else does meanwhile, and what killed ones left half written is gone.

    Raises RunError where another one is at work, or the folder isn't there or can't be written.
    """
    from filelock import FileLock, Timeout

    if not dest.is_dir():
        raise RunError(f"{dest} is no folder; connect the disk that it is on, or make it once: mkdir -p {dest}")
    lock = FileLock(dest / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"{dest} is in use by another backup; wait for it") from error
    except OSError as error:
        raise RunError(f"cannot write in {dest} ({error.strerror}); choose a folder that you may write") from error
    try:
        for folder in (dest / CONTENT).glob("??"):
            remove_abandoned(folder, SHA256)
        remove_abandoned(dest / MANIFESTS, r"\S+\.json")
        yield
    finally:
        lock.release()


def content_path(dest: Path, sha256: str) -> Path:
    """Where a content lies."""
    return dest / CONTENT / sha256[:2] / sha256


def is_there(dest: Path, output: Output) -> bool:
    """Whether a content is stored, by its size; `is_whole` reads it."""
    path = content_path(dest, output.sha256)
    return path.is_file() and path.stat().st_size == output.size


def copy(source: Path, target: Path, sha256: str) -> None:
    """Copy a file whole or not at all: it is flushed to the disk, read back, and gets its name last.

    Raises OSError, and RunError where what is read back has another hash.
    """
    require_file(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read back from the disk, not from memory
        if hash_file(temporary) != sha256:
            raise RunError(f"{source} is not what it was, or {target.parent} does not keep what is written; try again")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned_in(folder: Path, files: Iterable[str]) -> None:
    """Remove what killed processes left half copied of these files, relative to the folder."""
    inside = defaultdict(list)
    for file in files:
        inside[folder / Path(file).parent].append(re.escape(Path(file).name))
    for parent, patterns in inside.items():
        remove_abandoned(parent, f"(?:{'|'.join(patterns)})")


def names(dest: Path) -> list[str]:
    """Every backup, the oldest first; its name is the time of its end."""
    return sorted(path.stem for path in (dest / MANIFESTS).glob("[!.]*.json"))


def write(dest: Path, manifest: Manifest) -> str:
    """Write a backup's manifest; returns the backup's name. Raises RunError where it can't be written."""
    values = asdict(manifest)
    path = _manifest_path(dest, f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}")
    path = free_name(path) if path.exists() else path
    write_atomically(path, json.dumps({"sha256": hash_of(values), **values}, indent=1) + "\n")
    return path.stem


def read(dest: Path, name: str) -> Manifest:
    """One backup's manifest. Raises RunError where there is none, and for a damaged one."""
    _require_backup(dest)
    if name not in names(dest):
        raise RunError(f"{dest} holds no backup called {name}; there are: {', '.join(names(dest))}")
    path = _manifest_path(dest, name)
    try:
        values = json.loads(read_bytes(path))
        sha256 = values.pop("sha256")
        manifest = from_plain(Manifest, values)
        if sha256 != hash_of(values):
            raise ValueError("its checksum is another one")
        if wrong := [file for file in manifest.files if Path(file).is_absolute() or ".." in Path(file).parts]:
            raise ValueError(f"{wrong[0]} lies outside the folder")
        if any(not re.fullmatch(SHA256, output.sha256) for output in manifest.files.values()):
            raise ValueError("a hash is none")
    except UNREADABLE as error:
        others = ", ".join(other for other in names(dest) if other != name) or "there is none"
        way = f"delete it, or name another backup: {others}"
        raise RunError(f"{path} is damaged ({first_line(error)}); {way}") from error
    return manifest


def last(dest: Path, folder: str, host: str) -> tuple[str, Manifest | None]:
    """Name and manifest of a folder's last backup, of those that can be read; empty and None where there is none."""
    for name in reversed(names(dest)):
        with suppress(RunError):
            manifest = read(dest, name)
            if (manifest.folder, manifest.host) == (folder, host):
                return name, manifest
    return "", None


def contents(dest: Path) -> dict[str, str]:
    """Hash of every content of all backups -> a file that has it. Raises RunError for a damaged or no manifest."""
    _require_backup(dest)
    return {output.sha256: file for name in names(dest) for file, output in read(dest, name).files.items()}


def is_whole(dest: Path, sha256: str) -> bool:
    """Whether a stored content, which is read, is what its name says."""
    try:
        return hash_file(content_path(dest, sha256)) == sha256
    except OSError:  # it is gone, or the disk fails there
        return False


def _require_backup(dest: Path) -> None:
    if not names(dest):
        raise RunError(f"{dest} holds no backup; make one first: finetune backup {dest}")


def _manifest_path(dest: Path, name: str) -> Path:
    return dest / MANIFESTS / f"{name}.json"
