"""The files that a stage left in the run folder, known by content: a stage is up to date only as long as they are.

A file is hashed again only if its size or one of its times has changed, so a look at a large adapter costs nothing.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from finetune.run.hashing import Stamp, hash_file, stamp_of, trusted
from finetune.run.progress import plural, say


@dataclass(frozen=True)
class Output:
    """One file. size: bytes. stamp: of when it was last hashed, empty if a later change could look the same."""

    size: int
    stamp: Stamp
    sha256: str


def outputs_of(run_dir: Path, paths: Iterable[Path]) -> dict[str, Output]:
    """Files, and all files of folders, by their path in the run folder. Raises OSError where one can't be read."""
    files = sorted(file for path in paths for file in _files(path))
    return {file.relative_to(run_dir).as_posix(): _output(file) for file in files}


def output_of(file: Path, noted: Output | None = None) -> Output:
    """A file as of today; it is read only if it isn't as it was noted. Raises OSError."""
    return noted if noted and noted.stamp == stamp_of(file) else _output(file)


def compare(run_dir: Path, noted: Mapping[str, Output]) -> tuple[str, dict[str, Output]]:
    """What is wrong with the first file that is no longer as it was noted, empty if all are; and all as of today."""
    for name, output in noted.items():
        file = run_dir / name
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or not file.is_file():
            return f"{name} is gone", {}
        if file.stat().st_size != output.size:
            return f"{name} has changed", {}
    found = {name: output_of(run_dir / name, output) for name, output in noted.items()}
    changed = [name for name, output in noted.items() if found[name].sha256 != output.sha256]
    return (f"{changed[0]} has changed", {}) if changed else ("", found)


def set_aside_changed(run_dir: Path, folder: Path, noted: Mapping[str, Output], replacement: Path) -> None:
    """Move the files of `folder`, which is to be replaced, that are neither as they were noted nor as in `replacement`:
    a person may have changed or added them.

    They go to a folder beside it, `FOLDER-kept-N/`, which is said; so does a file in place of the folder. Raises
    OSError.
    """
    there = sorted(file for file in _files(folder) if file.exists())
    changed = [
        file
        for file in there
        if not _is_noted(run_dir, file, noted) and not _equal(file, replacement / file.relative_to(folder))
    ]
    if not changed:
        return
    target = free_name(folder.with_name(f"{folder.name}-kept"))
    for file in changed:
        moved = target / file.relative_to(folder)
        moved.parent.mkdir(parents=True, exist_ok=True)
        file.rename(moved)
    first = changed[0].relative_to(run_dir)
    say(f"{plural(len(changed), 'file')} changed or added since {folder} was made, first {first}: now in {target}")


def free_name(path: Path) -> Path:
    """`path` with a number in front of its suffix that makes it a new name."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _is_noted(run_dir: Path, file: Path, noted: Mapping[str, Output]) -> bool:
    output = noted.get(file.relative_to(run_dir).as_posix())
    return output is not None and output_of(file, output).sha256 == output.sha256


def _equal(one: Path, other: Path) -> bool:
    return other.is_file() and one.stat().st_size == other.stat().st_size and hash_file(one) == hash_file(other)


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file())
    else:
        yield path


def _output(file: Path) -> Output:
    now, stamp = time.time_ns(), stamp_of(file)
    return Output(stamp[0], stamp if trusted(stamp, now) else (), hash_file(file))
