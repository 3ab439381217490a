"""The rows of a metadata file: file names of images and what is said of them, their captions above all.

imagefolder of the `datasets` library reads `metadata.jsonl`, `metadata.csv` and `metadata.parquet`, one kind in a
folder; here a folder may hold the first two, and what differs between them is named.
"""

import hashlib
import json
import posixpath
import time
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data import strict_json
from finetune.data.images import authors
from finetune.data.text import readers
from finetune.errors import DataError
from finetune.reading import require_size
from finetune.run.atomic import write_atomically
from finetune.run.hashing import Stamp, hash_file, stamp_of, trusted

METADATA, METADATA_CSV = "metadata.jsonl", "metadata.csv"
READ = (METADATA, METADATA_CSV)  # of two in one folder the first counts: captions are written there
TEXT_BYTES = 1 << 30  # of a file of captions, those of a whole folder included
COLUMNS = ("text", "caption", "prompt")  # of a row's caption, the first that is filled; new ones go into the first
MOST_FILES, MOST_ROWS = 64, 100_000  # whose rows are kept; a row takes about 1 KiB
EXPECTED = {
    METADATA: 'expected {"file_name": "a.jpg", "text": "…"}',
    METADATA_CSV: "expected a first line file_name,text and then one line for each image",
}


@dataclass(frozen=True)
class Row:
    """One row of a metadata file: its line as it stands in JSON, its values, and the line number from 1."""

    line: str
    values: dict[str, Any]
    number: int

    @property
    def text(self) -> str:
        """The caption, stripped; empty where there is none."""
        named = self._named()
        return next((text for column in COLUMNS if (text := (named.get(column) or "").strip())), "")

    @property
    def is_generated(self) -> bool:
        """Whether a captioner wrote the caption, and nobody changed it since."""
        return bool(self.text) and self.values.get(authors.MARK) == authors.mark(self.text)

    @property
    def other_texts(self) -> list[str]:
        """Of a row without a column for the caption: columns that may hold it under another name."""
        if self._named().keys() & set(COLUMNS):
            return []
        others = {name: value for name, value in self.values.items() if name not in ("file_name", authors.MARK)}
        texts = {name: value for name, value in others.items() if isinstance(value, str)}
        return [name for name, value in texts.items() if any(map(str.isalpha, value))]  # CSV has numbers as texts

    def _named(self) -> dict[str, Any]:
        return {name.casefold(): value for name, value in self.values.items()}


def read_rows(file: Path) -> Mapping[str, Row]:
    """Rows of a metadata file by `file_name`, in its order. Raises DataError naming the file and the line.

    Every stage asks for them, so a file whose content this process has seen is not read into rows again.
    """
    known = _known.get(file.absolute())
    try:
        require_size(file, TEXT_BYTES)
        stamp, now = stamp_of(file), time.time_ns()
        if known and known.stamp == stamp:
            return known.rows
        sha256 = hash_file(file)
    except OSError:  # reading it says what is wrong
        return _parsed(file)
    rows = known.rows if known and known.sha256 == sha256 else _parsed(file)
    _keep(file, _Known(stamp if trusted(stamp, now) else (), sha256, rows))
    return rows


def write_rows(file: Path, rows: Mapping[str, Row]) -> None:
    """Write `metadata.jsonl`. Raises RunError where it can't be written."""
    text = "\n".join(row.line for row in rows.values()) + "\n"
    write_atomically(file, text)
    _keep(file, _Known((), hashlib.sha256(text.encode()).hexdigest(), rows))


@dataclass(frozen=True)
class _Known:
    """A file as this process read it. stamp: empty if it can't be trusted."""

    stamp: Stamp
    sha256: str
    rows: Mapping[str, Row]


_known: dict[Path, _Known] = {}


def _keep(file: Path, found: _Known) -> None:
    _known.pop(file.absolute(), None)
    _known[file.absolute()] = found
    while len(_known) > MOST_FILES or sum(len(known.rows) for known in _known.values()) > MOST_ROWS:
        del _known[next(iter(_known))]  # the one that was read first


def _parsed(file: Path) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for row in _csv_rows(file) if file.name == METADATA_CSV else _json_rows(file):
        where, values = f"{file}, line {row.number}", row.values
        if not isinstance(values.get("file_name"), str) or not values["file_name"]:
            raise DataError(f'{where}: has no "file_name"; {EXPECTED[file.name]}')
        named = [folded for column in values if (folded := column.casefold()) in COLUMNS]
        if twice := next((column for column in named if named.count(column) > 1), ""):
            raise DataError(f'{where}: has "{twice}" twice, in small and capital letters; keep one of them')
        for column, value in values.items():
            if column.casefold() in COLUMNS and not isinstance(value, str | None):
                raise DataError(f'{where}: "{column}" must be a text, got {json.dumps(value)}')
        if not is_text(line_of(values)):
            raise DataError(f"{where}: holds half a character (a surrogate without its pair); type the character again")
        name = key(values["file_name"])
        if name in rows:
            raise DataError(f"{where}: {name} has a row on line {rows[name].number} already; keep one of them")
        rows[name] = row
    return rows


def _json_rows(file: Path) -> Iterator[Row]:
    for number, line in enumerate(decode(file).split("\n"), start=1):  # not splitlines: texts may hold U+2028
        if not line.strip():
            continue
        try:
            values = strict_json.loads(line)
        except strict_json.KeyTwice as error:
            raise DataError(f"{file}, line {number}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: is not JSON ({error}); {EXPECTED[METADATA]}") from error
        yield Row(line.rstrip("\r"), values if isinstance(values, dict) else {}, number)


def _csv_rows(file: Path) -> Iterator[Row]:
    """As conversations are read: commas, semicolons or tabs between the cells, every cell a text."""
    try:
        require_size(file, TEXT_BYTES)
        open(file, "rb").close()  # a folder of this name is no table
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error.strerror})") from error
    for number, values in readers.read(file):
        if isinstance(values, DataError):
            raise values
        if any(map(str.strip, values.values())):  # spreadsheets leave empty rows
            yield Row("", values, number)


def key(name: str) -> str:
    """What two spellings of a path have in common: other separators, needless dots, other Unicode forms."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: names that aren't and half surrogates can't."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def decode(path: Path) -> str:
    """A text of captions. Raises DataError for one that isn't UTF-8 or can't be read."""
    try:
        require_size(path, TEXT_BYTES)
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8 (0x{error.object[error.start]:02x}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error


def generated(text: str) -> dict[str, str]:
    """The columns of a caption that a captioner wrote."""
    return {COLUMNS[0]: text, authors.MARK: authors.mark(text)}


def line_of(values: dict[str, Any]) -> str:
    """A row as a line of `metadata.jsonl`."""
    return json.dumps(values, ensure_ascii=False)
