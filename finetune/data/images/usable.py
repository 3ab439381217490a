"""Which images of a folder can be used, and which are to be captioned: what captioning and a plan ask first."""

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from finetune.data.images import authors, decode, folder
from finetune.data.images.ahead import ahead
from finetune.errors import DataError
from finetune.run.progress import plural, say
from finetune.run.records import CaptionSet

LISTED = 10  # texts in an error; the rest is counted


def unreadable(root: Path, files: Sequence[str], max_pixels: int, seconds: float) -> tuple[dict[str, str], int]:
    """Of the first files, as many as are looked at in so many seconds: those that don't decode -> what is wrong with
    each, and how many were looked at. Nothing is kept, unlike in an `ImageIndex`, which finds the same.

    Raises DataError for a file that can't be read.
    """

    def problem(file: str) -> str:
        with decode.file_bytes(root / file) as data:
            try:
                decode.check(root / file, data, max_pixels)
            except DataError as error:
                return str(error)
        return ""

    found: dict[str, str] = {}
    until, looked = time.monotonic() + seconds, 0
    for file, wrong in zip(files, ahead(files, problem), strict=False):
        looked += 1
        found |= {file: wrong} if wrong else {}
        if time.monotonic() > until:
            break
    return found, looked


def readable(root: Path, files: Sequence[str], broken: Mapping[str, str], *, skip: bool) -> list[str]:
    """The files that aren't `broken`, which are reported. Raises DataError if none is left, or unless bad ones are to
    `skip`."""
    decode.report_bad(list(broken.values()), skip=skip)
    left = [file for file in files if file not in broken]
    if not left:
        raise DataError(f"{root} has no readable image left; try data.folder=path/to/images")
    return left


def to_caption(
    root: Path, files: Sequence[str], captions: folder.Captions, generated: Collection[str], *, overwrite: bool
) -> list[str]:
    """The files without a caption; all of them to `overwrite`. generated: `authors.key` of what captioners wrote.

    Raises DataError if there are any, and texts that fit no image, which their captions may be, or no captions can be
    written. Where none is missing, such texts are a warning.
    """
    todo = [file for file in files if overwrite or file not in captions.texts]
    strays = [stray for stray in captions.strays if authors.key(stray.name, stray.text) not in generated]
    _report_strays(strays, missing=0 if overwrite else len(todo))
    folder.check_writable(root, todo)
    return todo


def generated(root: Path, cache: Path, before: CaptionSet | None) -> set[str]:
    """`authors.key` of what captioners wrote, by what folder, cache and the run before remember."""
    items = before.items if before else ()
    keys = {authors.key(item.file, item.text) for item in items if item.source == "generated"}
    return keys | authors.remembered(cache) | folder.generated_captions(root)


def _report_strays(strays: Sequence[folder.Stray], *, missing: int) -> None:
    if not strays:
        return
    if not missing:
        say(f"warning: {plural(len(strays), 'text')} for no image, first {strays[0].where}")
        return
    listed = "".join(f"\n  {stray.where}" for stray in strays[:LISTED])
    more = f"\n  and {len(strays) - LISTED:,} more" if len(strays) > LISTED else ""
    raise DataError(
        f"{plural(missing, 'image')} without a caption, and {plural(len(strays), 'text')} for no image. Rename each "
        f"text to fit its image, or move it out of the folder to have captions generated:{listed}{more}"
    )
