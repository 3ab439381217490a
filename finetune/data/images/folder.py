"""A folder of images and their captions: `metadata.jsonl` as imagefolder of the `datasets` library reads it, or a
`.txt` beside an image.

Only names and texts are read here; nothing is decoded.
"""

import json
import posixpath
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError
from finetune.run.atomic import write_atomically
from finetune.run.progress import say

METADATA = "metadata.jsonl"
# What Pillow decodes by itself. imagefolder lists PostScript, fonts' and films' files too, and no AVIF.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif"),
    *(".avifs", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".tga"),
)
UNSUPPORTED = (".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw", ".eps", ".ico")


@dataclass(frozen=True)
class Row:
    """One line of a metadata file: its text as it stands, its values, and the line number from 1."""

    line: str
    values: dict[str, Any]
    number: int


def images(folder: Path) -> list[str]:
    """Every image below a folder, as sorted paths relative to it with forward slashes.

    Hidden files and folders are left out, as imagefolder does. Raises DataError if the folder is missing, empty or
    without images.
    """
    if not str(folder) or not folder.exists():
        raise DataError(f"there is no folder {folder}; name the folder of your images: data.folder=path/to/images")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; name the folder that holds it: data.folder={folder.parent}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    paths = [path.relative_to(folder) for path in files if path.suffix.lower() in EXTENSIONS]
    if found := sorted(path.as_posix() for path in paths if not _hidden(path)):
        return found
    others = Counter(path.suffix.lower() or path.name for path in files)
    if not others:
        raise DataError(f"{folder} is empty; put images into it or name another folder: data.folder=path/to/images")
    seen = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    raise DataError(
        f"{folder} has no images (found: {seen}); readable are {' '.join(EXTENSIONS)}; "
        "put images into it or name another folder: data.folder=path/to/images"
    )


def unsupported_files(folder: Path) -> list[str]:
    """Files that look like images but are in formats that can't be read here (HEIC, SVG, camera raw, …)."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in UNSUPPORTED)


def captions(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """The captions that are there, image -> text: from `metadata.jsonl` (here or below), else from the `.txt`.

    Blank texts count as none. Raises DataError for texts that aren't UTF-8, broken or contradictory metadata lines.
    """
    by_name = {unicodedata.normalize("NFC", file): file for file in files}
    found: dict[str, str] = {}
    unknown_rows: list[str] = []
    for metadata in metadata_files(folder):
        parent = metadata.parent.relative_to(folder).as_posix()
        for name, row in read_rows(metadata).items():
            file = by_name.get(posixpath.normpath(posixpath.join(parent, name)))
            if file is None:
                unknown_rows.append(name)
            elif text := (row.values.get("text") or "").strip():
                found[file] = text
    if unknown_rows:
        count = len(unknown_rows)
        say(f"warning: {METADATA} of {folder} names {count} images that aren't there, first {unknown_rows[0]}")
    return {file: text for file in files if file not in found and (text := _sidecar(folder, file))} | found


def overridden_sidecars(folder: Path, texts: Mapping[str, str]) -> list[str]:
    """Images whose `.txt` says something else than the caption that is taken, sorted."""
    return sorted(file for file, text in texts.items() if _sidecar(folder, file) not in ("", " ".join(text.split())))


def add_captions(folder: Path, texts: Mapping[str, str], *, overwrite: bool) -> None:
    """Write captions into `metadata.jsonl`, in place where a row is there, below where not; all else in it stays.

    The file is read again first, so a caption that was typed meanwhile is kept unless `overwrite`. Raises RunError
    where it can't be written.
    """
    targets: dict[Path, dict[str, str]] = {}
    for file, text in texts.items():
        metadata = metadata_of(folder, file)
        name = (folder / file).relative_to(metadata.parent).as_posix()
        targets.setdefault(metadata, {})[unicodedata.normalize("NFC", name)] = text
    for metadata, named in targets.items():
        rows = read_rows(metadata) if metadata.exists() else {}
        lines = []
        for name, row in rows.items():
            kept = name not in named or (not overwrite and (row.values.get("text") or "").strip())
            lines.append(row.line if kept else _line(row.values | {"text": named[name]}))
        lines += [_line({"file_name": name, "text": text}) for name, text in named.items() if name not in rows]
        write_atomically(metadata, "\n".join(lines) + "\n")


def metadata_of(folder: Path, file: str) -> Path:
    """The metadata file that an image's caption belongs to: the nearest one above it, else the folder's own."""
    parent = (folder / file).parent
    while parent != folder and not (parent / METADATA).exists():
        parent = parent.parent
    return parent / METADATA


def check_writable(folder: Path, files: Sequence[str]) -> None:
    """Raises DataError if a metadata file could not be replaced (it is tried: rights alone don't say)."""
    for parent in sorted({metadata_of(folder, file).parent for file in files}):
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise DataError(
                f"captions can't be written to {parent / METADATA} ({error.strerror}); make the folder writable "
                f"(chmod u+w), or copy the images and try data.folder=COPY"
            ) from error


def metadata_files(folder: Path) -> list[Path]:
    """Every `metadata.jsonl` in the folder and below, sorted. Raises DataError for a metadata file of another kind."""
    for other in ("metadata.csv", "metadata.parquet"):
        if (folder / other).exists():
            raise DataError(
                f"{folder / other}: captions are read from {METADATA} only; write its rows there as "
                f'{{"file_name": …, "text": …}}, one a line, and move {other} away'
            )
    return sorted(path for path in folder.rglob(METADATA) if not _hidden(path.relative_to(folder)))


def read_rows(metadata: Path) -> dict[str, Row]:
    """Rows of a metadata file by `file_name`, in its order. Raises DataError naming the file and the line."""
    rows: dict[str, Row] = {}
    for number, line in enumerate(_decode(metadata).split("\n"), start=1):  # not splitlines: texts may hold U+2028
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f'{where}: is not JSON ({error}); expected {{"file_name": …, "text": …}}') from error
        if not isinstance(values, dict) or not isinstance(values.get("file_name"), str) or not values["file_name"]:
            raise DataError(f'{where}: has no "file_name"; expected {{"file_name": "a.jpg", "text": "…"}}')
        if not isinstance(values.get("text"), str | None):
            raise DataError(f'{where}: "text" must be a text, got {json.dumps(values["text"])}')
        name = unicodedata.normalize("NFC", posixpath.normpath(values["file_name"]))
        if name in rows:
            raise DataError(f"{where}: {name} has a row on line {rows[name].number} already; keep one of them")
        rows[name] = Row(line.rstrip("\r"), values, number)
    return rows


def _sidecar(folder: Path, file: str) -> str:
    """The text of the `.txt` beside an image, in one line; empty where there is none."""
    sidecar = (folder / file).with_suffix(".txt")
    return " ".join(_decode(sidecar).split()) if sidecar.is_file() else ""


def _hidden(path: Path) -> bool:
    """Whether imagefolder passes over a path."""
    return path.name.startswith(".") or any(part.startswith((".", "__")) for part in path.parent.parts)


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8 (0x{error.object[error.start]:02x}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False)
