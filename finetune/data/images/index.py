"""What is known of a folder's images without reading them: content hashes, sizes, and that they decode.

The index only saves work: identity is the content hash alone. It lies in the cache folder, a file per folder of images,
may be deleted at any time, and is ignored when damaged.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.images import decode
from finetune.errors import DataError, RunError
from finetune.reading import read_bytes
from finetune.run.atomic import remove_abandoned, write_atomically
from finetune.run.hashing import RACY_NS, Stamp, hash_of, stamp_of
from finetune.run.progress import Silence, say

FORMAT = "images-4"  # of the index: change it when a row means something else
READ_THREADS = 4  # reading, hashing and decoding release the interpreter lock
AT_ONCE = 1024  # files that wait for a thread
SAVED_EVERY_S = 60.0  # writing the index of a hundred thousand images takes a second or two


@dataclass(frozen=True)
class Row:
    """One file as it was read last. stamp: empty if it can't be trusted. size: upright width and height in pixels,
    None if it doesn't decode. guessed: its colours are. animated: frames follow the first."""

    stamp: Stamp
    sha256: str
    size: tuple[int, int] | None
    guessed: bool = False
    animated: bool = False


class ImageIndex:
    """The images of one folder. A file is read again only if its size or one of its times has changed."""

    def __init__(self, folder: Path, *, cache: Path, max_pixels: int) -> None:
        self.folder, self.max_pixels = folder, max_pixels
        # The path only finds the index again; of a folder that took another's place, the change times differ.
        self.path = cache / "images" / f"{hash_of(str(folder.resolve()))[:16]}.json"
        remove_abandoned(self.path.parent, r"[0-9a-f]{16}\.json")
        self.rows = _load(self.path)
        self.problems: dict[str, str] = {}

    def hashes(self, files: Sequence[str]) -> dict[str, str]:
        """sha256 (hex) of each file's bytes; a file that is read is decoded too. Raises DataError for a file that
        can't be read."""
        self._read(file for file in files if file not in self.rows or self.rows[file].stamp != _stamp(self._path(file)))
        return {file: self.rows[file].sha256 for file in files}

    def unreadable(self, files: Sequence[str]) -> dict[str, str]:
        """Of files that were hashed, those that can't be decoded -> what is wrong with each."""
        self._read(file for file in files if file not in self.problems and not self._decodes(self.rows[file]))
        return {file: self.problems[file] for file in files if file in self.problems}

    def size(self, file: str) -> tuple[int, int]:
        """Upright width and height in pixels of a file that decodes."""
        size = self.rows[file].size
        assert size is not None, f"{file} does not decode"
        return size

    def is_guessed(self, file: str) -> bool:
        """Whether programs show a file's colours differently."""
        return self.rows[file].guessed

    def is_animated(self, file: str) -> bool:
        """Whether frames follow the one that is trained."""
        return self.rows[file].animated

    def _read(self, files: Iterable[str]) -> None:
        changed = list(files)
        if not changed:
            return
        known = {row.sha256: row for row in self.rows.values() if self._decodes(row)}
        saved, silence = time.monotonic(), Silence()
        try:
            with ThreadPoolExecutor(READ_THREADS) as pool:
                for first in range(0, len(changed), AT_ONCE):
                    files = changed[first : first + AT_ONCE]
                    rows = pool.map(lambda file: self._look(file, known), files)
                    for done, (file, row) in enumerate(zip(files, rows, strict=True), start=first + 1):
                        self.rows[file] = row
                        if silence.is_long():
                            say(f"reading the images of {self.folder}: {done:,} of {len(changed):,} so far")
                    if time.monotonic() - saved > SAVED_EVERY_S:  # a kill loses no more
                        self._save()
                        saved = time.monotonic()
        finally:  # also after an interrupt: what was read until then need not be read again
            self._save()

    def _save(self) -> None:
        with suppress(RunError):  # without an index the next run is slower, that is all
            _save(self.path, {file: row for file, row in self.rows.items() if self._path(file).is_file()})

    def _look(self, file: str, known: dict[str, Row]) -> Row:
        """Read one file once: hash it, and decode it unless its content is `known` to decode."""
        path, now = self._path(file), time.time_ns()
        stamp = _stamp(path)
        with decode.file_bytes(path) as data:
            sha256 = content_hash(data)
            self.problems.pop(file, None)
            stamp = stamp if stamp[1] < now - RACY_NS else ()
            if sha256 in known:
                return replace(known[sha256], stamp=stamp)
            try:
                return Row(stamp, sha256, *decode.check(path, data, self.max_pixels))
            except DataError as error:
                self.problems[file] = str(error)
        return Row(stamp, sha256, None)

    def _decodes(self, row: Row) -> bool:
        return row.size is not None and row.size[0] * row.size[1] <= self.max_pixels

    def _path(self, file: str) -> Path:
        return self.folder / file


def content_hash(data: bytes) -> str:
    """Who an image is: sha256 (hex) of its file's bytes."""
    return hashlib.sha256(data).hexdigest()


def _stamp(path: Path) -> Stamp:
    """Raises DataError for a file that isn't there."""
    try:
        return stamp_of(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error


def _load(path: Path) -> dict[str, Row]:
    """The rows by file; none if there is no index or it is damaged."""
    try:
        checksum, text = read_bytes(path).decode().splitlines()
    except (OSError, ValueError):
        return {}
    if checksum != hash_of(FORMAT, text):
        return {}
    return {
        file: Row(tuple(stamp), sha256, tuple(size) if size else None, *flags)
        for file, (stamp, sha256, size, *flags) in json.loads(text).items()
    }


def _save(path: Path, rows: dict[str, Row]) -> None:
    text = json.dumps({file: list(vars(row).values()) for file, row in rows.items()})
    write_atomically(path, f"{hash_of(FORMAT, text)}\n{text}\n")
