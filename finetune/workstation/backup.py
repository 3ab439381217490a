"""`finetune backup`: a second copy of what can't be made again, in a folder on another disk, and the way back."""

import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.images.folder import caption_files, images
from finetune.errors import ConfigError, DataError, RunError
from finetune.reading import at_home
from finetune.run import rundir
from finetune.run.hashing import hash_file
from finetune.run.outputs import Output, output_of
from finetune.run.progress import plural, progress, size_text
from finetune.run.receipts import receipt_path
from finetune.workstation import backup_folder as folders
from finetune.workstation.backup_folder import Manifest

USAGE = "finetune backup DEST, finetune backup DEST --check, finetune backup DEST --restore FOLDER [BACKUP]"
OUTPUTS, RECIPES = "outputs", "conf"
OUTSIDE = "outside"  # in a backup, where files from outside the folder lie, by their whole path
IN_USE = "in use; as the last backup has it, if it does"
CRON = "17 3 * * *"  # every night; not at the full hour, when everything else starts


@dataclass(frozen=True)
class Backup:
    """name: of the backup; the last one's where nothing had changed since. copied: files that were not stored yet."""

    dest: Path
    name: str
    manifest: Manifest
    copied: int
    copied_bytes: int
    changed: bool


@dataclass(frozen=True)
class Restored:
    """source: the folder that was backed up. kept: files that are there with other content, and stay as they are."""

    folder: Path
    name: str
    source: str
    written: int
    same: int
    kept: tuple[str, ...]


def main(words: Sequence[str]) -> int:
    """Back up, check or restore; the exit code is 0. Raises ConfigError for other words, RunError where it fails."""
    match words:
        case [dest] if not dest.startswith("-"):
            print(text(backup(_folder(dest), Path.cwd())))
        case [dest, "--check"]:
            print(check(_folder(dest)))
        case [dest, "--restore", folder, *name] if len(name) < 2:
            print(_restored_text(restore(_folder(dest), at_home(folder), *name)))
        case _:
            raise ConfigError(f"backup takes a folder and no recipe: {USAGE}; got {shlex.join(words) or 'nothing'}")
    return 0


def backup(dest: Path, folder: Path) -> Backup:
    """Copy what is new of a folder's finished runs, recipes and captions.

    The images, conversations, base models and caches that they came from are listed as left out. Raises RunError where
    there is nothing to back up, a file can't be read or changes meanwhile, or `dest` can't be written.
    """
    folder, dest, host = folder.absolute(), dest.resolve(), socket.gethostname()
    with folders.opened(dest):
        name, before = folders.last(dest, str(folder), host)
        known = before.files if before else {}
        try:
            paths, left_out = _chosen(folder)
            busy = {run for run, why in left_out.items() if why == IN_USE}
            kept = {file: output for file, output in known.items() if busy & set(map(str, Path(file).parents))}
            if not paths and not kept:
                here = f"{folder} has no finished run in {OUTPUTS}/ and no recipe in {RECIPES}/"
                raise RunError(f"{here}; go where they are")
            if inside := next((path for path in paths if path.resolve().is_relative_to(dest)), None):
                raise RunError(f"{dest} would back itself up, with {inside}; choose a folder that no run lies in")
            files, copied = _copied(dest, {_name(path, folder): path for path in paths}, known)
        except OSError as error:
            file, why = error.filename or dest, error.strerror
            raise RunError(f"cannot back up {file} ({why}); the last backup is as it was") from error
        manifest = Manifest(str(folder), host, kept | files, left_out)
        changed = before is None or _contents(before) != _contents(manifest)
        name = folders.write(dest, manifest) if changed else name
    return Backup(dest, name, manifest, len(copied), sum(copied), changed)


def check(dest: Path) -> str:
    """Read every stored file; a line that says how many. Raises RunError where one is missing or has changed."""
    contents, wrong = folders.contents(dest), []
    with progress("check", len(contents), unit="files") as shown:
        for sha256, name in contents.items():
            if not folders.is_whole(dest, sha256):
                wrong.append(f"{folders.content_path(dest, sha256)} ({name})")
            shown.advance()
    if wrong:
        way = "delete what is damaged, and the next backup copies it again where it still can"
        raise RunError(f"{plural(len(wrong), 'file')} of {dest} missing or damaged, first {wrong[0]}; {way}")
    return f"{plural(len(contents), 'file')} of {plural(len(folders.names(dest)), 'backup')}: all as they were written"


def restore(dest: Path, folder: Path, name: str = "") -> Restored:
    """Write the files of a backup, the last one if none is named, into a folder. Files that are there stay.

    Raises RunError where the backup is damaged or the folder can't be written, after all that can be restored is; the
    same call goes on from there.
    """
    name = name or next(reversed(folders.names(dest)), "")
    manifest = folders.read(dest, name)
    folders.remove_abandoned_in(folder, manifest.files)
    written, same, kept, failed = 0, 0, list[str](), list[str]()
    with progress("restore", len(manifest.files), unit="files") as shown:
        for file, output in manifest.files.items():
            target = folder / file
            try:
                if not target.exists() and not target.is_symlink():
                    folders.copy(folders.content_path(dest, output.sha256), target, output.sha256)
                    written += 1
                elif target.is_file() and hash_file(target) == output.sha256:
                    same += 1
                else:
                    kept.append(file)
            except (OSError, RunError) as error:
                failed.append(f"{target} ({error})")
            shown.advance()
    if failed:
        count = plural(len(failed), "file")
        raise RunError(f"{count} not restored, first {failed[0]}; the same command goes on from here")
    return Restored(folder, name, manifest.folder, written, same, tuple(kept))


def text(made: Backup) -> str:
    """What was backed up, what was left out, and how to do this every night."""
    manifest = made.manifest
    size = size_text(sum(output.size for output in manifest.files.values()))
    rows = "\n".join(f"  {name}: {why}" for name, why in manifest.left_out.items()) or "  nothing"
    command = shlex.join([sys.executable, "-m", "finetune", "backup", str(made.dest)])
    line = f"{CRON} cd {shlex.quote(manifest.folder)} && {command}".replace("%", r"\%")
    return f"""\
backup {made.name} in {made.dest}{"" if made.changed else ", unchanged since"}
{plural(len(manifest.files), "file")}, {size}; {made.copied:,} of them copied now, {size_text(made.copied_bytes)}

left out
{rows}

every night: type crontab -e and add
{line}"""


def _restored_text(found: Restored) -> str:
    counts = f"{found.written:,} written, {found.same:,} there already"
    lines = [f"backup {found.name} of {found.source} in {found.folder}: {counts}"]
    if found.kept:
        lines.append("there with other content, which stays; restore into an empty folder to have the backup's:")
    return "\n".join([*lines, *(f"  {file}" for file in found.kept)])


def _folder(dest: str) -> Path:
    """Raises ConfigError for the address of another machine."""
    path = at_home(dest)
    if ":" in dest and not path.exists():
        way = f"back up to a folder, then copy that: rclone copy FOLDER {dest}"
        raise ConfigError(f"{dest} is no folder of this machine; {way}")
    return path


def _chosen(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files to back up, and what is left out -> why."""
    paths = [path for path in _files(folder / RECIPES) if path.suffix == ".yaml"]
    left_out: dict[str, str] = {}
    for run in _runs(folder / OUTPUTS):
        name = _name(run, folder)
        if not receipt_path(run, "train").is_file():
            left_out[name] = "not finished"
            continue
        if rundir.is_held(run):
            left_out[name] = IN_USE
        else:
            paths += _files(run)
        try:
            captions, sources = _sources(folder, rundir.written_config(run))
        except RunError as error:
            captions, sources = [], {f"captions of {name}": f"they are not known: {error}"}
        paths += captions
        left_out |= sources
    return list(dict.fromkeys(paths)), left_out


def _runs(folder: Path) -> Iterator[Path]:
    """Run folders below a folder; of those in a run folder, which are its own, none."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (path / rundir.CONFIG).is_file() and (path / "receipts").is_dir():
            yield path
        elif path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from _runs(path)


def _files(folder: Path) -> Iterator[Path]:
    """All files below, but hidden ones: locks, and what killed processes left half written.

    Raises OSError for a folder that can't be read, which `rglob` would pass over.
    """

    def refuse(error: OSError) -> None:
        raise error

    for above, inner, names in os.walk(folder, onerror=refuse) if folder.is_dir() else ():
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        paths = (Path(above, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _sources(folder: Path, settings: Mapping[str, Any]) -> tuple[list[Path], dict[str, str]]:
    """The files with the captions of a run's images, and what else the run came from -> why it is left out."""
    data, base, found = settings.get("data", {}), str(settings.get("model", {}).get("base", "")), []
    left_out = {str(data["cache"]): "a cache; it is made again"} if data.get("cache") else {}
    if base and not base.startswith("embedded:"):
        left_out[base] = "a base model"
    if data.get("file"):
        left_out[str(data["file"])] = "conversations, yours to copy"
    if data.get("folder"):
        place = folder / at_home(str(data["folder"]))
        try:
            found, count = caption_files(place), plural(len(images(place)), "image")
            why = f"{count}, yours to copy; their captions are backed up"
        except DataError as error:
            why = f"its captions can't be read: {error}"
        left_out[str(data["folder"])] = why
    return found, left_out


def _copied(dest: Path, paths: Mapping[str, Path], known: Mapping[str, Output]) -> tuple[dict[str, Output], list[int]]:
    """Every file's content by name, and the sizes of those that were not stored yet. Raises OSError, RunError."""
    files, copied = {}, []
    with progress("backup", len(paths), unit="files") as shown:
        for name, path in paths.items():
            files[name] = output = output_of(path, known.get(name))
            if not folders.is_there(dest, output):
                folders.copy(path, folders.content_path(dest, output.sha256), output.sha256)
                copied.append(output.size)
            shown.advance()
    return files, copied


def _name(path: Path, folder: Path) -> str:
    """A file's name in a backup: relative to the folder, or below `OUTSIDE`."""
    path = path.absolute()
    return (path.relative_to(folder) if path.is_relative_to(folder) else Path(OUTSIDE, *path.parts[1:])).as_posix()


def _contents(manifest: Manifest) -> Any:
    return {name: output.sha256 for name, output in manifest.files.items()}, manifest.left_out
