"""Rows as they stand in a file: JSON, JSON lines, CSV, Parquet, or a folder saved by the `datasets` library.

Everything is streamed, so a file may be larger than memory. A row that can't be read comes as a DataError in its place
where the next one can still be found (JSON lines, CSV); otherwise the error is raised.
"""

import codecs
import csv
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
BLOCK = 1 << 20  # read at once, bytes or characters
TABLE_ROWS = 256  # rows of a Parquet file or a saved dataset held at once
LONGEST_CELL = 1 << 30  # characters; csv's own limit of 131,072 is less than a long conversation
QUOTES = "put double quotes around cells that hold separators or line ends, and double those within"
JSON_TAIL = 12  # characters of the longest escape (a pair of surrogates): an error this near the end may be a cut

Rows = Iterator[tuple[int, Any]]  # (line or row number from 1, the value or a DataError)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files to read, sorted: the file itself, the readable files of a folder, or a folder saved by `datasets`.

    Raises DataError for a missing path, an unknown suffix or a folder without readable files.
    """
    if not path.exists():
        raise DataError(f"there is no {path}; name your conversations: data.file=path/to/conversations.jsonl")
    if path.is_dir() and not _saved(path):
        found = tuple(sorted(item for item in path.iterdir() if item.suffix.lower() in SUFFIXES))
        if not found:
            raise DataError(
                f"{path} is neither a folder saved by `datasets` nor one with {', '.join(SUFFIXES)} files; "
                "name a file: data.file=path/to/conversations.jsonl"
            )
        return found
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: files are read as {', '.join(SUFFIXES)}; convert it or rename it: data.file=conversations.jsonl"
        )
    return (path,)


def read(path: Path) -> Rows:
    """The rows of one of `files_of`, numbered by line (texts) or row (tables) from 1.

    Raises DataError for files that can't be read, wrong encodings and damage behind which no row can be found.
    """
    try:
        if path.is_dir():
            yield from _dataset(path)
        elif path.suffix.lower() in (".jsonl", ".ndjson"):
            yield from _json_lines(path)
        elif path.suffix.lower() == ".json":
            yield from _json(path)
        elif path.suffix.lower() == ".parquet":
            yield from _parquet(path)
        else:
            yield from _csv(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from error


def content_hash(files: tuple[Path, ...]) -> str:
    """sha256 (hex) of everything in these files, whatever they are called."""
    digest = hashlib.sha256()
    for file in files:
        parts = sorted(item for item in file.rglob("*") if item.is_file()) if file.is_dir() else [file]
        for part in parts:
            try:
                with open(part, "rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise DataError(f"{part}: can't be read ({error.strerror})") from error
    return digest.hexdigest()


def _saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _json_lines(path: Path) -> Rows:
    offset = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = _decode(path, number, line, offset)
                if text.strip():
                    yield number, json.loads(text)
            except DataError as error:
                yield number, error
            except (ValueError, RecursionError) as error:
                # The error's own words name a line too, counted within this one.
                reason = f"{error.msg}, column {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
                yield number, DataError(f"{path}:{number}: is not JSON ({reason}); every line must be one object")
            offset += len(line)


def _decode(path: Path, number: int, line: bytes, offset: int) -> str:
    try:
        return line.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, offset + error.start, line[error.start]) from error


def _not_utf8(path: Path, number: int, offset: int, value: int) -> DataError:
    return DataError(f"{path}:{number}: byte {offset} is not UTF-8 (0x{value:02x}); save the file as UTF-8")


def _json(path: Path) -> Rows:
    """One array of rows, or objects one after the other (JSON lines under another name, a single object)."""
    source = _Scanner(path)
    array = source.peek() == "["
    if array:
        source.at += 1
    first = True
    while True:
        character = source.peek()
        if array and character == "]":
            source.at += 1
            array, first = False, True
            if source.peek():
                raise source.error("goes on behind the end of its array")
            return
        if not character:
            if array:
                raise source.error("ends inside its array")
            return
        if array and not first:
            if character != ",":
                raise source.error("lacks a comma between two rows")
            source.at += 1
            source.peek()
        first = False
        yield source.line, source.value()


class _Scanner:
    """Reads JSON values off a file block by block, and counts lines."""

    def __init__(self, path: Path) -> None:
        self.path, self.line, self.at, self.text = path, 1, 0, ""
        self.decoder = json.JSONDecoder()
        self.blocks = self._blocks()
        self.wanted = BLOCK

    def peek(self) -> str:
        """The next character that isn't white space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.line += self.text[self.at] == "\n"
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def value(self) -> Any:
        self.wanted = BLOCK
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - JSON_TAIL
                if cut and self._more():
                    self.wanted *= 2  # a large row is not parsed again for every block
                    continue
                self.line += self.text.count("\n", self.at, error.pos)
                raise self.error(f"is not JSON ({error.msg})") from error
            except RecursionError as error:
                raise self.error("is nested too deeply") from error
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            return value

    def error(self, what: str) -> DataError:
        return DataError(f"{self.path}:{self.line}: {what}; a .json file holds one array of objects: [{{…}}, {{…}}]")

    def _more(self) -> bool:
        block = next(self.blocks, "")
        self.text, self.at = self.text[self.at :] + block, 0
        return bool(block)

    def _blocks(self) -> Iterator[str]:
        decoder, offset = codecs.getincrementaldecoder("utf-8-sig")(), 0
        with open(self.path, "rb") as stream:
            while data := stream.read(self.wanted):
                pending = len(decoder.getstate()[0])
                try:
                    if text := decoder.decode(data):
                        yield text
                except UnicodeDecodeError as error:
                    line = self.line + self.text.count("\n", self.at) + error.object[: error.start].count(b"\n")
                    raise _not_utf8(
                        self.path, line, offset - pending + error.start, error.object[error.start]
                    ) from error
                offset += len(data)
            if rest := decoder.getstate()[0]:
                line = self.line + self.text.count("\n", self.at)
                raise _not_utf8(self.path, line, offset - len(rest), rest[0])


def _csv(path: Path) -> Rows:
    csv.field_size_limit(LONGEST_CELL)
    with open(path, "rb") as stream:
        head = stream.readline().decode("utf-8-sig", errors="replace")
    separator = max(",;\t", key=head.count)  # spreadsheets write semicolons where the comma is the decimal sign
    reader = csv.reader(_lines(path), delimiter=separator, strict=True)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            if not names:
                names = [cell.strip() for cell in cells]
            elif cells and len(cells) != len(names):
                yield line, DataError(f"{path}:{line}: has {len(cells)} cells for {len(names)} columns; {QUOTES}")
            elif cells:
                yield line, dict(zip(names, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: is not CSV ({error}); {QUOTES}") from error


def _lines(path: Path) -> Iterator[str]:
    offset = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield _decode(path, number, line, offset)
            offset += len(line)


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as table:
            batches = table.iter_batches(batch_size=TABLE_ROWS)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is no readable Parquet file ({_short(error)}); write or copy it again") from error


def _dataset(path: Path) -> Rows:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library makes of a damaged folder
        raise DataError(f"{path}: can't be loaded by `datasets` ({_short(error)}); save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        name = "train" if "train" in loaded else next(iter(loaded), "") if len(loaded) == 1 else ""
        if not name:
            raise DataError(
                f"{path}: has the parts {', '.join(loaded)} and none is called train; name one: data.file={path}/PART"
            )
        loaded = loaded[name]
    batches = loaded.with_format(None).iter(batch_size=TABLE_ROWS)
    rows = (dict(zip(batch, cells, strict=True)) for batch in batches for cells in zip(*batch.values(), strict=True))
    yield from enumerate(rows, start=1)


def _short(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:150] or type(error).__name__
