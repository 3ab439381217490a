"""The files that a stage left in the run folder, known by content: a stage is up to date only as long as they are.

A file is hashed again only if its size or one of its times has changed, so a look at a large adapter costs nothing.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from finetune.run.hashing import Stamp, hash_file, stamp_of, trusted


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


def compare(run_dir: Path, noted: Mapping[str, Output]) -> tuple[str, dict[str, Output]]:
    """What is wrong with the first file that is no longer as it was noted, empty if all are; and all as of today."""
    for name, output in noted.items():
        file = run_dir / name
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or not file.is_file():
            return f"{name} is gone", {}
        if file.stat().st_size != output.size:
            return f"{name} has changed", {}
    found = {name: _again(run_dir / name, output) for name, output in noted.items()}
    changed = [name for name, output in noted.items() if found[name].sha256 != output.sha256]
    return (f"{changed[0]} has changed", {}) if changed else ("", found)


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file())
    else:
        yield path


def _again(file: Path, noted: Output) -> Output:
    return noted if noted.stamp == stamp_of(file) else _output(file)


def _output(file: Path) -> Output:
    now, stamp = time.time_ns(), stamp_of(file)
    return Output(stamp[0], stamp if trusted(stamp, now) else (), hash_file(file))
