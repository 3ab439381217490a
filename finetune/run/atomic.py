"""Files and folders that are whole or not there, whatever ends the program while they are written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.errors import RunError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename: a reader sees the old file or the new one.

    Raises RunError where the folder can't be written or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # unlink fails too where `path.parent` is a file
            temporary.unlink()
        raise RunError(
            f"cannot write {path} ({error.strerror}); free the disk or choose a folder you may write"
        ) from error


@contextmanager
def replace_folder(folder: Path, *, durable: bool = False) -> Iterator[Path]:
    """A new empty folder to fill, which takes `folder`'s place when the block ends well and vanishes when it doesn't.

    durable: its files survive a power cut. Raises RunError where the disk is full or not writable.
    """
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    try:
        for left in (temporary, old):  # from a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
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
