"""What is below a folder of images: a walk that leaves out what nobody means, and gives up where no images are."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from finetune.errors import DataError
from finetune.run.progress import Silence, plural, say

# Folders that file servers and systems keep beside a person's images: thumbnails (Synology), and what was deleted.
SYSTEM_FOLDERS = ("@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found")
# A folder with so many files that are neither images nor beside one, and fewer images than one for so many of them, is
# a home folder or a disk: what is found there was never meant. Looking at as many takes a second or two.
MOST_OTHERS, OTHERS_AN_IMAGE = 100_000, 100


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Every file, folder and link below a folder; hidden ones (`.` before a name, `__` before a folder's) and systems'
    folders are left out as imagefolder does, links to folders not followed.

    Raises DataError for a folder that can't be listed, or whose files can't be looked at.
    """
    inner = [os.fspath(folder)]
    while inner:
        here = inner.pop()
        try:
            with os.scandir(here) as listed:
                found = [entry for entry in listed if not _is_left_out(entry)]
            if found and not os.access(here, os.X_OK):  # names alone
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), here)
        except FileNotFoundError:  # deleted meanwhile
            continue
        except OSError as error:
            raise _unreadable(error) from error
        inner += [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
        yield from found


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file or a link to one. Raises DataError for a link into a folder that can't be looked at."""
    return _followed(entry.is_file)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one. Raises DataError as `is_file`."""
    return _followed(entry.is_dir)


def _followed(is_so: Callable[[], bool]) -> bool:
    try:
        return is_so()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself, which leads nowhere
            return False
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> DataError:
    name = os.fsencode(error.filename).decode(errors="backslashreplace")
    return DataError(
        f"{name}: can't be read ({error.strerror}); make it readable, move it away, or name another folder: "
        "data.folder=path/to/images"
    )


def watched(
    folder: Path, found: Iterable[os.DirEntry[str]], images: tuple[str, ...], beside: tuple[str, ...]
) -> Iterator[os.DirEntry[str]]:
    """The same entries; of a long walk it is said how far it is. images, beside: endings of files, in small letters.

    Raises DataError where there is so much else that this can be no folder of images.
    """
    silence = Silence()
    pictured = others = 0
    for files, entry in enumerate(found, start=1):
        name = entry.name.lower()
        pictured += name.endswith(images)
        others += not name.endswith((*images, *beside))
        if others >= max(MOST_OTHERS, OTHERS_AN_IMAGE * pictured):
            raise DataError(
                f"{folder} is no folder of images: {plural(pictured, 'image')} among its first {files:,} files and "
                "folders; name the folder of your images: data.folder=path/to/images"
            )
        if silence.is_long():
            say(f"looking for images in {folder} and below: {plural(pictured, 'image')} among {files:,} files so far")
        yield entry


def _is_left_out(entry: os.DirEntry[str]) -> bool:
    """Whether imagefolder passes over it, or it is a system's folder."""
    name = entry.name
    if name.startswith("."):
        return True
    return (name.startswith("__") or name.lower() in SYSTEM_FOLDERS) and is_folder(entry)
