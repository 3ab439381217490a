"""Files and folders that are whole or not there, whatever ends the program while they are written."""

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.errors import RunError

ABANDONED_S = 3600.0
"""Age of a temporary file that nobody writes any more; writing one takes seconds."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename: a reader sees the old file or the new one.

    Raises RunError where the folder can't be written or the disk is full.
    """
    try:
        replace_file(path, content.encode() if isinstance(content, str) else content, durable=True)
    except OSError as error:
        raise RunError(
            f"cannot write {path} ({error.strerror}); free the disk or choose a folder you may write"
        ) from error


def replace_file(path: Path, data: bytes, *, durable: bool) -> None:
    """`write_atomically`, and only if `durable` flushed to disk. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(temporary, data, durable)
        try:
            os.replace(temporary, path)
        except FileNotFoundError:  # another machine on this disk took it for abandoned: it knows no such process
            _write(temporary, data, durable)
            os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def _write(path: Path, data: bytes, durable: bool) -> None:
    with open(path, "wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def replace_folder(folder: Path, *, durable: bool = False) -> Iterator[Path]:
    """A new empty folder to fill, which takes `folder`'s place when the block ends well and vanishes when it doesn't.

    Its files get the rights that any new file has, whatever the library that wrote them thinks of it (safetensors: the
    owner's alone). durable: they survive a power cut. Raises RunError where the disk is full or not writable.
    """
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    try:
        for left in (temporary, old):  # from a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        rights = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != rights:
                path.chmod(rights)
        if durable:
            for path in [*temporary.iterdir(), temporary]:
                _flush(path)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
        if durable:
            _flush(folder.parent)
    except OSError as error:
        raise RunError(
            f"cannot write {folder} ({error.strerror}); free the disk or choose a folder you may write"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, patterns: Mapping[str, str]) -> None:
    """Remove what killed processes left of the functions above; only for whoever alone writes there.

    patterns: sub-folder -> regular expression of the names that may be written in it, so that nobody else's file with
    such an ending is touched. A folder that was moved aside and not replaced any more comes back.
    """
    for name, pattern in patterns.items():
        for path in _entries(folder / name):
            found = re.fullmatch(rf"\.(?P<name>{pattern})\.(?P<ending>\d+\.tmp|tmp|old)", path.name)
            if not found:
                continue
            final = path.with_name(found["name"])
            with suppress(OSError):  # of another user: they cost nothing but space
                if path.is_file():
                    path.unlink()
                elif found["ending"] == "old" and not final.exists():
                    path.rename(final)
                else:
                    shutil.rmtree(path)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove temporary files of `write_atomically` where others may write too, of processes that are gone.

    pattern: of the final names.
    """
    for path in _entries(folder):
        found = re.fullmatch(rf"\.{pattern}\.(\d+)\.tmp", path.name)
        with suppress(OSError):  # another process was faster, or they are somebody else's
            if found and (_is_gone(int(found[1])) or time.time() - path.stat().st_mtime > ABANDONED_S):
                path.unlink()


def _is_gone(process: int) -> bool:
    """Whether no process of this machine has the number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def _entries(folder: Path) -> list[Path]:
    """Files and folders in a folder, without links; none where it can't be read."""
    try:
        return [path for path in folder.iterdir() if not path.is_symlink()]
    except OSError:
        return []
