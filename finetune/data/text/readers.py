"""Rows as they stand in a file: JSON, JSON lines, CSV, Parquet, or a folder saved by the `datasets` library.

A row that can't be read comes as a DataError in its place where the next one can still be found (JSON lines, CSV);
otherwise the error is raised. All but .json files are streamed, so that a file may be larger than memory.

Texts come as they are written. `datasets.load_dataset` (5.2) doesn't do that: it infers a type for each column, so that
dates become timestamps, "007" becomes 7 and turns with different keys become JSON; it fills up short rows of CSV, finds
nothing in a folder whose name holds a bracket, and leaves lock files in the user's home.
"""

import csv
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from finetune.config import recipes
from finetune.config.spelling import setting
from finetune.data import strict_json
from finetune.data.splits import HELD_OUT
from finetune.data.text.columns import ROW_COLUMNS
from finetune.errors import DataError
from finetune.reading import ARCHIVES, at_home, read_text, require_file
from finetune.run.hashing import Stamp, hash_file, stamp_of, trusted
from finetune.run.progress import plural

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
PARQUET_ROWS = 256  # rows of a Parquet file held at once
LONGEST_CELL = 1 << 30  # characters; csv's own limit of 131,072 is less than a long conversation
JSON_BYTES = 1 << 30  # of a .json file, which is held in memory several times over
LINE_BYTES = 1 << 28  # of one line; a conversation that fills a model's context has a few MiB
QUOTES = "put double quotes around cells that hold separators or line ends, and double those within"
NOT_SPACE = re.compile(r"[^ \t\r\n]")
ADDRESS = re.compile(r"(?:https?|ftp|hf|s3|gs):/", re.I)  # as a path, one slash of two is left
ABOUT = ("dataset_info.json", "dataset_infos.json")  # what LLaMA-Factory and `datasets` write about files beside them
ARRAY = "a .json file holds one array of objects: [{…}, {…}]"

NumberedRows = Iterator[tuple[int, Any]]  # (line or row number from 1, the value or a DataError)


def files_of(named: Path) -> tuple[Path, ...]:
    """The files to read, in the order of the paths, of a folder sorted.

    named: a path, or several with the system's path separator between them. Each is a file, a folder with readable
    files (without hidden ones, and those of `held_out_files` and `passed_over`), or a folder saved by `datasets`.
    Raises DataError for a missing path, an unknown suffix or a folder without readable files.
    """
    return tuple(file for path in paths_of(named) for file in _files_of(path))


def held_out_files(named: Path) -> tuple[Path, ...]:
    """Files, and parts of folders saved by `datasets`, that are a test or validation split by name.

    They are not read beside a training split; whoever wants one names it.
    """
    saved = [path for path in paths_of(named) if path.is_dir() and _saved(path)]
    parts = [folder / name for folder in saved for name in _other_parts(folder)]
    return (*parts, *(file for folder in _plain_folders(named) for file in _by_split(folder)[1]))


def passed_over(named: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """What lies in folders and is no file of conversations: JSON about something else, as config.json is, and folders
    with readable files. They are not read; whoever wants one names it."""
    folders = _plain_folders(named)
    read = {file for folder in folders for file in _by_split(folder)[0]}
    others = tuple(file for folder in folders for file in _readable(folder) if file not in read and _is_other(file))
    inner = [item for folder in folders for item in sorted(folder.iterdir()) if _is_inner(item)]
    return others, tuple(inner)


def paths_of(named: Path) -> tuple[Path, ...]:
    """One path, or each of those between the system's path separator."""
    whole = str(named)
    if ADDRESS.match(whole):
        raise DataError(f"{whole} is an address; download the file and name it: data.file=path/to/conversations.jsonl")
    # A name may hold the separator too. `Path.exists` raises for a text that is longer than a path can be.
    if os.pathsep not in whole or os.path.exists(whole):  # noqa: PTH110
        return (named,)
    return tuple(at_home(part) for part in whole.split(os.pathsep) if part)


def _files_of(path: Path) -> tuple[Path, ...]:
    if not path.exists():
        shipped = recipes.elsewhere(path)
        where = (
            f"the example's are {setting('data.file', shipped)}" if shipped else "data.file=path/to/conversations.jsonl"
        )
        raise DataError(f"there is no {path}; name your conversations: {where}")
    if path.is_dir() and not _saved(path):
        found, _ = _by_split(path)
        if not found:
            raise DataError(
                f"{path} is neither a folder saved by `datasets` nor one with {', '.join(SUFFIXES)} files; "
                "name a file: data.file=path/to/conversations.jsonl"
            )
        return found
    if path.is_file() and path.suffix.lower() in ARCHIVES:
        raise DataError(f"{path} is packed; unpack it and name what was in it: data.file=path/to/conversations.jsonl")
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: files are read as {', '.join(SUFFIXES)}; convert it or rename it: data.file=conversations.jsonl"
        )
    return (path,)


def _plain_folders(named: Path) -> list[Path]:
    return [path for path in paths_of(named) if path.is_dir() and not _saved(path)]


def _readable(folder: Path) -> list[Path]:
    return sorted(
        item
        for item in folder.iterdir()
        if item.suffix.lower() in SUFFIXES and not item.name.startswith(".") and item.name not in ABOUT
    )


def _is_inner(item: Path) -> bool:
    """Whether it is a folder that somebody may have meant."""
    hidden = item.name.startswith((".", "__"))
    return not hidden and item.suffix.lower() not in SUFFIXES and item.is_dir() and bool(_readable(item))


def _is_other(file: Path) -> bool:
    """Whether a file is one JSON object without a column of a row, also below an id or a name of a list."""
    if file.suffix.lower() != ".json":
        return False
    try:
        require_file(file)
        with open(file, "rb") as stream:
            if not stream.read(16).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
                return False  # rows, and these may be many
        found = json.loads(read_text(file).removeprefix("\ufeff"))
    except (OSError, ValueError, RecursionError):  # reading it says what is wrong
        return False
    inner = [value[0] if isinstance(value, list) and value else value for value in found.values()]
    return not any(isinstance(value, dict) and value.keys() & ROW_COLUMNS for value in (found, *inner))


def _by_split(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files of rows of a folder: those to train on, and those that are named as another split."""
    readable = _readable(folder)
    files = [
        file for file in readable if not _is_other(file)
    ] or readable  # of others alone, reading says what is wrong
    held_out = tuple(file for file in files if HELD_OUT.search(file.stem))
    training = tuple(file for file in files if file not in held_out)
    return (training, held_out) if training else (held_out, ())


def read(path: Path) -> NumberedRows:
    """The rows of one of `files_of`, numbered from 1: JSON lines and CSV by line, the others by row.

    Raises DataError for files that can't be read, wrong encodings and damage behind which no row can be found.
    """
    try:
        require_file(path)
        if path.is_dir():
            yield from _saved_dataset(path)
        elif path.suffix.lower() == ".parquet":
            yield from _parquet(path)
        elif path.suffix.lower() in (".csv", ".tsv"):
            yield from _csv(path)
        elif path.suffix.lower() == ".json":
            yield from enumerate(_json(path), start=1)
        else:
            yield from _json_lines(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from error


def content_hash(files: tuple[Path, ...]) -> str:
    """sha256 (hex) of everything in these files, whatever they are called."""
    digest = hashlib.sha256()
    for file in files:
        parts = sorted(item for item in file.rglob("*") if item.is_file()) if file.is_dir() else [file]
        for part in parts:
            try:
                digest.update(_digest(part))
            except OSError as error:
                raise DataError(f"{part}: can't be read ({error.strerror})") from error
    return digest.hexdigest()


def _digest(file: Path) -> bytes:
    """sha256 of a file, which may be large and is asked for twice in a run. Raises OSError."""
    stamp, now = stamp_of(file), time.time_ns()
    if (known := _digests.get(file.absolute())) and known[0] == stamp:
        return known[1]
    digest = bytes.fromhex(hash_file(file))
    if trusted(stamp, now):
        _digests[file.absolute()] = stamp, digest
    return digest


_digests: dict[Path, tuple[Stamp, bytes]] = {}


def _saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _other_parts(folder: Path) -> list[str]:
    """Of a saved folder with a training part, all others."""
    try:
        parts = json.loads(read_text(folder / "dataset_dict.json"))["splits"]
    except (OSError, ValueError, KeyError, TypeError):  # one part alone; or it is damaged, which reading it will say
        return []
    return [part for part in parts if part != "train"] if "train" in parts else []


def _saved_dataset(path: Path) -> NumberedRows:
    import datasets

    try:
        for file in sorted(path.rglob("*.arrow")):
            _validate(file)
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            loaded = loaded[_part(path, list(loaded))]
        yield from enumerate(loaded.with_format(None), start=1)
    except DataError:
        raise
    except Exception as error:  # whatever the library makes of a damaged folder
        raise DataError(f"{path}: can't be loaded by `datasets` ({_short(error)}); save it again") from error


def _validate(file: Path) -> None:
    """Arrow trusts the lengths in a file that it maps into memory: a changed one ends the process. Raises what Arrow
    raises where it reads and compares."""
    import pyarrow

    stamp, now = stamp_of(file), time.time_ns()
    if (file, stamp) in _validated:
        return
    with open(file, "rb") as stream, pyarrow.ipc.open_stream(stream) as batches:
        _require_different_names(file, batches.schema)
        for batch in batches:
            batch.validate(full=True)
    if trusted(stamp, now):
        _validated.add((file, stamp))


_validated: set[tuple[Path, Stamp]] = set()
"""Files as this process found them whole: a data set is opened to see what it holds, and again for its rows."""


def _part(path: Path, parts: Sequence[str]) -> str:
    if "train" in parts or len(parts) == 1:
        return "train" if "train" in parts else parts[0]
    raise DataError(
        f"{path}: has the parts {', '.join(parts)} and none is called train; name one: "
        + setting("data.file", path / next(iter(parts), "PART"))
    )


def _parquet(path: Path) -> NumberedRows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as table:
            _require_different_names(path, table.schema_arrow)
            batches = table.iter_batches(batch_size=PARQUET_ROWS)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter of a text whose bytes have changed
        raise DataError(f"{path}: is no readable Parquet file ({_short(error)}); write or copy it again") from error


def _require_different_names(path: Path, fields: Sequence[Any]) -> None:
    """Raises DataError where two of Arrow's fields, here or within one, have a name: one of them would not be read."""
    names: set[str] = set()
    for field in fields:
        if field.name in names:
            raise DataError(f"{path}: has two columns called {field.name}; give one another name")
        names.add(field.name)
        _require_different_names(path, [field.type.field(at) for at in range(field.type.num_fields)])


def _csv(path: Path) -> NumberedRows:
    csv.field_size_limit(LONGEST_CELL)
    with open(path, "rb") as lines:
        # Spreadsheets write semicolons where the comma is the decimal sign.
        separator = max(b",", b";", b"\t", key=lines.readline(LINE_BYTES).count)
        lines.seek(0)
        texts = (_decode(path, line, number) for number, line in _lines(path, lines))
        reader = csv.reader(texts, delimiter=separator.decode(), strict=True)
        names: list[str] = []
        line = 1
        try:
            for cells in reader:
                if not names:
                    names = [cell.strip() for cell in cells]
                    if twice := [name for name in names if name and names.count(name) > 1]:
                        raise DataError(f"{path}:{line}: has two columns called {twice[0]}; give one another name")
                elif cells and len(cells) != len(names):
                    counted = f"{plural(len(cells), 'cell')} for {plural(len(names), 'column')}"
                    yield line, DataError(f"{path}:{line}: has {counted}; {QUOTES}")
                elif cells:
                    yield line, dict(zip(names, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{line}: is not CSV ({error}); {QUOTES}") from error


def _json(path: Path) -> list[Any]:
    """One array of rows, or objects one after the other (JSON lines under another name, a single object)."""
    if path.stat().st_size > JSON_BYTES:
        raise DataError(f"{path}: is longer than 1 GiB, and JSON is read as a whole; save it as JSON lines, .jsonl")
    text, at = _decode(path, path.read_bytes(), 1), 0
    values: list[Any] = []
    try:
        while begin := NOT_SPACE.search(text, at):
            value, at = strict_json.raw_decode(text, begin.start())
            values.append(value)
    except strict_json.KeyTwice as error:
        raise DataError(f"{path}:{error.line}: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is not JSON ({error.msg}, column {error.colno}); {ARRAY}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); {ARRAY}") from error
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _json_lines(path: Path) -> NumberedRows:
    with open(path, "rb") as lines:
        for number, line in _lines(path, lines):
            try:
                text = _decode(path, line, number)
                if text.strip():
                    yield number, strict_json.loads(text)
            except DataError as error:
                yield number, error
            except strict_json.KeyTwice as error:
                yield number, DataError(f"{path}:{number}: {error}")
            except (ValueError, RecursionError) as error:
                # The error's own words name a line too, counted within this one.
                reason = f"{error.msg}, column {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
                yield number, DataError(f"{path}:{number}: is not JSON ({reason}); every line must be one object")


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """A file's lines, numbered. Raises DataError for one without end, as a file of nothing but zeros is."""
    for number in itertools.count(1):
        line = stream.readline(LINE_BYTES)
        if not line:
            return
        if len(line) == LINE_BYTES:
            raise DataError(f"{path}:{number}: is longer than 256 MiB; save the file as JSON lines or CSV")
        yield number, line


def _decode(path: Path, data: bytes, first: int) -> str:
    """Lines of a file from the `first` on. Raises DataError naming the first byte that isn't UTF-8."""
    try:
        return data.decode().removeprefix("\ufeff" if first == 1 else "")
    except UnicodeDecodeError as error:
        line = first + data.count(b"\n", 0, error.start)
        byte = error.start - data.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: byte {byte} of the line is not UTF-8 (0x{data[error.start]:02x}); save the file as UTF-8"
        ) from error


def _short(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:150] or type(error).__name__
