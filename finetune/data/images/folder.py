"""A folder of images and their captions: `metadata.jsonl` or `metadata.csv` as imagefolder of the `datasets` library
reads them, or a text file beside an image.

Only names and texts are read here; nothing is decoded.
"""

import os
import posixpath
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path, PurePosixPath

from finetune.config import recipes
from finetune.config.spelling import setting
from finetune.data.images import authors, walk
from finetune.data.images.metadata import (
    METADATA,
    READ,
    Row,
    decode,
    generated,
    is_text,
    key,
    line_of,
    read_rows,
    write_rows,
)
from finetune.errors import DataError
from finetune.reading import ARCHIVES, require_file
from finetune.run.atomic import remove_abandoned
from finetune.run.progress import plural

SIDECARS = (".txt", ".caption", ".cap", ".text")  # beside an image, the first that is there; in any case of letters
# Beside an image, of other tools and of people.
UNREAD = (
    *(".json", ".md", ".tags", ".tag", ".wd14", ".yaml", ".yml", ".toml", ".csv", ".tsv", ".xml", ".xmp", ".captions"),
    *(".prompt", ".prompts", ".desc", ".description", ".label", ".rtf", ".doc", ".docx", ".odt", ".html"),
)
# Of captions for a whole folder.
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".yaml", ".yml", ".toml", ".xlsx", ".xls", ".ods", ".xml")
TABLE_NAMES = (
    "metadata",
    "captions",
    "caption",
    "prompts",
    "dataset",
    "train",
    "meta_cap",
    "meta_clean",
)  # kohya's last
NO_CAPTIONS = ("readme", "license", "licence")  # stems of files that come with a data set and hold no caption
# What Pillow decodes by itself. imagefolder lists PostScript, fonts' and films' files too, and no AVIF.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif"),
    *(".avifs", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".tga"),
)
UNSUPPORTED = (".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw", ".eps", ".ico")


@dataclass(frozen=True)
class Stray:
    """A text that a person may have meant for an image, but for none that is there: `where` it is and why it belongs to
    none; of a row of metadata also its file name and text."""

    where: str
    name: str = ""
    text: str = ""


@dataclass(frozen=True)
class Captions:
    """texts: image -> its caption. sources: image -> the file that its caption stands in, relative to the folder.
    unused: image -> another file with another text. strays: texts of no image. unread: files beside images without a
    caption that may hold one, in a form that isn't read."""

    texts: dict[str, str]
    sources: dict[str, str]
    unused: dict[str, str]
    strays: tuple[Stray, ...]
    unread: tuple[str, ...]


def images(folder: Path) -> list[str]:
    """Every image below a folder, as sorted paths relative to it with forward slashes.

    Hidden files and folders are left out, as imagefolder does, folders of the system, and run folders, which hold drawn
    images. Raises DataError if the folder is missing, empty, without images, or obviously another folder.
    """
    if not str(folder) or not folder.exists():
        shipped = recipes.elsewhere(folder)
        where = f"the example's is {setting('data.folder', shipped)}" if shipped else "data.folder=path/to/images"
        raise DataError(f"there is no folder {folder}; name the folder of your images: {where}")
    if folder.is_file() and folder.suffix.lower() in ARCHIVES:
        raise DataError(f"{folder} is packed; unpack it and name the folder of your images: data.folder=path/to/images")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; name the folder that holds it: {setting('data.folder', folder.parent)}")
    entries = walk.watched(folder, walk.entries(folder), EXTENSIONS, (*SIDECARS, *UNREAD))
    visible = _visible(folder, entries)
    if found := sorted(path.as_posix() for path in visible if path.suffix.lower() in EXTENSIONS):
        if misnamed := [file for file in found if not is_text(file)]:
            raise DataError(
                f"{folder}: {plural(len(misnamed), 'file name')} not in UTF-8, first {os.fsencode(misnamed[0])!r}; "
                "give the image another name"
            )
        return found
    if broken := no_files(folder):
        raise DataError(f"{folder} has no images; {next(iter(broken.values()))}")
    others = Counter(path.suffix.lower() or path.name for path in visible)
    linked = linked_folders(folder)
    if not others and not linked:
        hidden = sorted(entry.name for entry in os.scandir(folder) if entry.name.startswith("."))
        what = f"has nothing but what is hidden ({', '.join(hidden[:5])})" if hidden else "is empty"
        raise DataError(f"{folder} {what}; put images into it or name another folder: data.folder=path/to/images")
    if linked:
        raise DataError(
            f"{folder} has no images, and linked folders are not followed: {', '.join(linked[:5])}; name one of them: "
            f"{setting('data.folder', folder / linked[0])}"
        )
    seen = ", ".join(f"{count} {suffix}" for suffix, count in Counter(dict(sorted(others.items()))).most_common(5))
    raise DataError(
        f"{folder} has no images (found: {seen}); readable are {' '.join(EXTENSIONS)}; "
        "put images into it or name another folder: data.folder=path/to/images"
    )


def linked_folders(folder: Path) -> list[str]:
    """Symbolic links to folders: what is in them is left out, as imagefolder does."""
    links = [entry for entry in walk.entries(folder) if entry.is_symlink() and walk.is_folder(entry)]
    return sorted(path.as_posix() for path in _relative(folder, links))


def run_folders(folder: Path) -> list[str]:
    """Run folders below the folder: those of somebody who trains on the current folder lie in it."""
    return [run.as_posix() for run in _runs_among(_relative(folder, walk.entries(folder)))]


def no_files(folder: Path) -> dict[str, str]:
    """What is named like an image and is neither a file nor a folder, a link to nowhere or a pipe -> what is wrong."""
    found = [path for path in _visible(folder, files_only=False) if path.suffix.lower() in EXTENSIONS]
    return {path.as_posix(): wrong for path in found if (wrong := _why_no_file(folder / path))}


def _why_no_file(path: Path) -> str:
    try:
        require_file(path)
    except OSError as error:
        return f"{path}: can't be read ({error.strerror})"
    return ""


def unsupported_files(folder: Path) -> list[str]:
    """Files that look like images but are in formats that can't be read here (HEIC, SVG, camera raw, …)."""
    return [path.as_posix() for path in _visible(folder) if path.suffix.lower() in UNSUPPORTED]


def captions(folder: Path, files: Sequence[str], generated: Collection[str] = ()) -> Captions:
    """The captions that are there: from `metadata.jsonl` (here or below), else from `metadata.csv`, else from the text
    file beside an image.

    A text whose `authors.key` is among the `generated` ones counts only where a person wrote none, wherever they stand.
    Blank texts count as none. Raises DataError for texts that aren't UTF-8, broken or contradictory metadata lines.
    """
    owners = [*files, *unsupported_files(folder)]
    rows, strays, unnamed = _from_metadata(folder, owners)
    visible = _visible(folder, files_only=False)  # a caption that can't be read is not passed over
    beside = _sidecars(visible, owners, SIDECARS)
    found: dict[str, tuple[str, str]] = {}  # image -> its caption and where that stands
    unused: dict[str, str] = {}
    candidates = [*rows, *_from_sidecars(folder, beside)]
    by_captioner = [authors.key(file, text) in generated for file, text, _ in candidates]
    for (file, text, source), is_generated in sorted(zip(candidates, by_captioner, strict=True), key=itemgetter(1)):
        if file in found and found[file][0].split() != text.split() and not is_generated:
            unused[file] = source
        found.setdefault(file, (text, source))
    strays += [stray for file, stray in unnamed.items() if file not in found]
    lonely = [PurePosixPath(path) for path, its_images in beside.items() if not its_images]
    strays += [
        Stray(f"{path}: there is no image {path.stem}") for path in lonely if path.stem.lower() not in NO_CAPTIONS
    ]
    others = _sidecars(visible, owners, UNREAD)
    strays += [Stray(f"{path}: captions are read from {' and '.join(READ)} only") for path in _tables(visible)]
    return Captions(
        {file: found[file][0] for file in files if file in found},
        {file: found[file][1] for file in files if file in found},
        {file: unused[file] for file in files if file in unused},
        tuple(strays),
        tuple(path for path, its_images in others.items() if its_images and not found.keys() & set(its_images)),
    )


def generated_captions(folder: Path) -> set[str]:
    """The `authors.key` of every caption whose row says that a captioner wrote it."""
    rows = [entry for metadata in metadata_files(folder) for entry in read_rows(metadata).items()]
    return {authors.key(name, row.text) for name, row in rows if row.is_generated}


def add_captions(folder: Path, texts: Mapping[str, str], *, overwrite: bool) -> None:
    """Write captions into `metadata.jsonl`, in place where a row is there, below where not; all else in it stays. A
    `metadata.csv` is a person's and stays as it is.

    The file is read again first, so a caption that was typed meanwhile is kept unless `overwrite`. Raises RunError
    where it can't be written.
    """
    targets: dict[Path, dict[str, str]] = {}
    for file, text in texts.items():
        metadata = metadata_of(folder, file)
        name = (folder / file).relative_to(metadata.parent).as_posix()
        targets.setdefault(metadata, {})[key(name)] = text
    for metadata, named in targets.items():
        remove_abandoned(metadata.parent, re.escape(METADATA))
        before = read_rows(metadata) if metadata.exists() else {}
        rows: dict[str, Row] = {}
        for number, name in enumerate([*before, *(name for name in named if name not in before)], start=1):
            row = before.get(name)
            if row and (name not in named or (not overwrite and row.text)):
                rows[name] = replace(row, number=number)
            else:
                values = (row.values if row else {"file_name": name}) | generated(named[name])
                rows[name] = Row(line_of(values), values, number)
        write_rows(metadata, rows)


def metadata_of(folder: Path, file: str) -> Path:
    """The metadata file that an image's caption goes into: beside the nearest one above it, else the folder's own."""
    parent = (folder / file).parent
    while parent != folder and not any((parent / name).exists() for name in READ):
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
    """Every metadata file in the folder and below, the deepest first: an image belongs to the nearest above it.

    Raises DataError for a metadata file of another kind.
    """
    other = folder / "metadata.parquet"
    if other.exists():
        raise DataError(
            f"{other}: captions are read from {' and '.join(READ)} only; write its rows to one of them as "
            f'{{"file_name": …, "text": …}}, one a line, and move {other.name} away'
        )
    found = [Path(entry.path) for entry in walk.entries(folder) if entry.name in READ]
    return sorted(found, key=lambda path: (-len(path.parts), str(path.parent), READ.index(path.name)))


def caption_files(folder: Path) -> list[Path]:
    """Every file that captions are read from: metadata files, and text files beside images. Raises DataError."""
    owners = [*images(folder), *unsupported_files(folder)]
    beside = _sidecars(_visible(folder), owners, SIDECARS)
    return [*metadata_files(folder), *(folder / name for name, its_images in beside.items() if its_images)]


def _from_metadata(
    folder: Path, images: Sequence[str]
) -> tuple[list[tuple[str, str, str]], list[Stray], dict[str, Stray]]:
    """Of all metadata files: (image, caption, metadata file), rows of no image, and image -> a row without a caption
    that may hold one under another name."""
    by_name = {key(image): image for image in images}
    found, strays, unnamed = [], [], {}
    for metadata in metadata_files(folder):
        source = metadata.relative_to(folder).as_posix()
        for name, row in read_rows(metadata).items():
            image = by_name.get(key(posixpath.join(posixpath.dirname(source), name)))
            where = f"{source}, line {row.number}"
            if image is None and row.text:
                strays.append(Stray(f"{where}: there is no image {name}", name, row.text))
            elif image is not None and row.text:
                found.append((image, row.text, source))
            elif image is not None and row.other_texts:
                columns = ", ".join(row.other_texts)
                unnamed[image] = Stray(f'{where}: the caption must be called "text"; the columns are {columns}')
    return found, strays, unnamed


def _sidecars(visible: Sequence[Path], images: Sequence[str], suffixes: Sequence[str]) -> dict[str, list[str]]:
    """Text file of one of these suffixes -> the images it belongs to: those of its name, with or without the image's
    own suffix, else those whose name differs in the case of letters only. What is read first comes first."""
    exact, folded = defaultdict(list), defaultdict(list)
    for image in images:
        for name in (key(image), key(str(PurePosixPath(image).with_suffix("")))):
            exact[name].append(image)
            folded[name.casefold()].append(image)
    stems = {path: key(path.with_suffix("").as_posix()) for path in visible if path.suffix.lower() in suffixes}
    order = sorted(stems, key=lambda path: (stems[path] not in exact, suffixes.index(path.suffix.lower()), path))
    return {path.as_posix(): exact.get(stems[path]) or folded.get(stems[path].casefold(), []) for path in order}


def _from_sidecars(folder: Path, sidecars: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str, str]]:
    """(image, caption in one line, text file)."""
    for path, images in sidecars.items():
        if images and (text := " ".join(decode(folder / path).split())):
            yield from ((image, text, path) for image in images)


def _tables(visible: Sequence[Path]) -> list[str]:
    """Files in which other tools keep the captions of a folder, and which are not read."""
    return [
        path.as_posix()
        for path in visible
        if path.suffix.lower() in TABLES and path.stem.lower() in TABLE_NAMES and path.name not in READ
    ]


def _visible(folder: Path, entries: Iterable[os.DirEntry[str]] | None = None, *, files_only: bool = True) -> list[Path]:
    """Every file that isn't hidden or in a run folder, relative to the folder, sorted; else whatever is no folder.
    entries: of the folder, where they are at hand."""
    found = walk.entries(folder) if entries is None else entries
    kept = (entry for entry in found if (walk.is_file(entry) if files_only else not walk.is_folder(entry)))
    paths = sorted(_relative(folder, kept))
    runs = _runs_among(paths)
    return [path for path in paths if not any(path.is_relative_to(run) for run in runs)]


def _relative(folder: Path, entries: Iterable[os.DirEntry[str]]) -> list[Path]:
    """By their texts: Path.relative_to takes three times as long as the walk."""
    above = os.fspath(folder)
    start = len(above) + (not above.endswith(os.sep))
    return [Path(entry.path[start:]) for entry in entries]


def _runs_among(paths: Sequence[Path]) -> list[Path]:
    """The run folders that these paths, relative to one folder, lie in; that folder itself is none."""
    known = set(paths)
    found = (path.parents[1] for path in paths if path.parts[-2:] == ("receipts", "caption.json"))
    return sorted(run for run in found if run.parts and run / "config.yaml" in known)
