"""The run folder: made, held by one process at a time, its configuration written, its failures named."""

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, OutOfMemory, RunError, is_out_of_memory
from finetune.reading import read_text
from finetune.run import ranks, room
from finetune.run.atomic import remove_leftovers, write_atomically
from finetune.run.plain import UNREADABLE, first_line
from finetune.run.receipts import receipt_path

CONFIG = "config.yaml"
LOCK = ".lock"
OWNER = ".lock.json"  # who holds the lock; the lock itself is the operating system's and dies with its process
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
LEFTOVERS = {
    "": r"(\.lock|trained_on|restarted)\.json|(metrics|dataset)\.jsonl|config\.yaml|report\.html|adapter|samples"
    r"|annotations\.jsonl|(annotation|coco)\.json|data\.yaml|cvat\.xml",
    "receipts": r"\w+\.json",
    "checkpoints": r"step-\d{6,}",
    "samples_more": r"(\w[\w-]*-)?[0-9a-f]{6,8}",
}
"""What is written in a run folder under a temporary name first, by sub-folder."""
REPLACED = (CONFIG, "report.html", "metrics.jsonl", "dataset.jsonl", "trained_on.json", "restarted.json")
TRACES = (
    LOCK,
    "receipts/*.json",
    "checkpoints/step-*",
)  # of a run, however early it ended or wherever it was copied to
SECTIONS = ("model", "caption", "data", "lora", "sample")  # of config.yaml, as far as they are read again


@contextmanager
def held(folder: Path, settings: Mapping[str, Any], *, owns_config: bool = False, hint: str = "") -> Iterator[Path]:
    """The run folder, locked. Out-of-memory and full-disk errors inside come out as ours.

    settings: as plain values, for config.yaml. owns_config: the caller trains, so config.yaml is its to write; other
    verbs write it only where there is none. hint: what to type where memory is too small. A command that fails before
    it leaves anything there leaves no folder either. Of several processes the first one holds the folder for all.
    Raises RunError for a folder that is in use, can't be written, or holds a file of that name which is of no run.
    """
    if ranks.rank():
        with explained(folder, hint):
            yield folder
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    _require_no_other(folder, settings)
    _make(folder)
    with _locked(folder), _without_trace(made), explained(folder, hint), _in_place(folder):
        remove_leftovers(folder, LEFTOVERS)
        if not (folder / CONFIG).exists() or (owns_config and not _has_training_state(folder)):
            write_config(settings, folder)
        yield folder


def require_usable(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises RunError as `held` does, for a folder that can't be written or is no run's; nothing is made or locked."""
    _require_no_other(folder, settings)
    if error := room.unwritable(folder):
        raise RunError(_unwritable(folder, error))


@contextmanager
def explained(folder: Path, hint: str) -> Iterator[None]:
    """Turn errors of memory, of the disk, and of any file in the run folder into ours."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        if _is_of(error, DISK_FULL):
            raise RunError(_full(folder)) from error
        if _is_of(error, (errno.EFBIG,)):
            raise RunError(
                f"a file in {folder} is too large for its disk, or for ulimit -f; try another run_dir=PATH"
            ) from error
        if is_out_of_memory(error):
            raise OutOfMemory(f"out of memory; {hint}") from error
        if isinstance(error, OSError) and (file := _file_inside(folder, error)):
            whole = isinstance(error, PermissionError)
            way = "make it yours (chown), or readable (chmod)" if whole else "restore it from a copy, or delete it"
            raise RunError(f"cannot use {file} ({error.strerror}); {way}") from error
        raise


def is_held(folder: Path) -> bool:
    """Whether a command is at work there. A killed one leaves its note, without its process."""
    import psutil

    try:
        return bool(psutil.pid_exists(json.loads(read_text(folder / OWNER))["pid"]))
    except UNREADABLE:
        return False


def write_config(settings: Mapping[str, Any], folder: Path) -> None:
    """The resolved configuration as `config.yaml`: the same bytes from the command line and from Python."""
    import yaml

    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=120)
    write_atomically(folder / CONFIG, text)


def name_inside(path: Path, folder: Path) -> str:
    """A path as a run folder's records have it: relative to the run folder, or else absolute."""
    path, folder = path.absolute(), folder.absolute()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def written_config(folder: Path) -> dict[str, Any]:
    """The settings in `config.yaml`, empty where there is none. Raises RunError for a damaged one."""
    import yaml

    file = folder / CONFIG
    try:
        found = yaml.safe_load(read_text(file))
        if not isinstance(found, dict):
            raise TypeError("it holds no settings")
        if wrong := [key for key in SECTIONS if not isinstance(found.get(key, {}), dict)]:
            raise TypeError(f"{wrong[0]} has no settings")
        return dict(found)
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise RunError(f"{file} is damaged ({first_line(error)}); the same `train` command writes it again") from error


def _require_no_other(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises RunError for a folder of something else, whose files a run would replace."""
    written: set[str] = set()
    with suppress(RunError):  # a damaged one is named by whoever reads it
        written = written_config(folder).keys() - {"name", "run_dir"}
    if written and written.isdisjoint(settings):
        raise RunError(f"{folder} holds what another command made (train, or annotate); choose another: run_dir=PATH")
    foreign = [name for name in REPLACED if (folder / name).exists()]
    if foreign and not _is_of_a_run(folder):
        raise RunError(
            f"{folder / foreign[0]} is of no run, and a run would replace it; choose another folder: run_dir=PATH"
        )


def _is_of_a_run(folder: Path) -> bool:
    if any(any(folder.glob(pattern)) for pattern in TRACES):
        return True
    with suppress(RunError):
        return "run_dir" in written_config(folder)
    return False


def _has_training_state(folder: Path) -> bool:
    """Whether a run began here: then config.yaml says how, until the train stage has agreed to a new one."""
    checkpoints = folder / "checkpoints"
    return receipt_path(folder, "train").exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{CONFIG}.{os.getpid()}.tmp"
        probe.write_bytes(b"probe")
        probe.unlink(missing_ok=True)  # whoever has just taken the folder may have removed it
    except OSError as error:
        raise RunError(_unwritable(folder, error)) from error


def _unwritable(folder: Path, error: OSError) -> str:
    if _is_of(error, DISK_FULL):
        return _full(folder)
    return f"cannot write in the run folder {folder} ({error.strerror}); choose one that you may write: run_dir=PATH"


def _full(folder: Path) -> str:
    return f"the disk of {folder} is full; free some space, or choose another folder: run_dir=PATH"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(
            f"{folder} is in use by {_owner(folder)}; wait for it, or choose another run_dir=PATH"
        ) from error
    except OSError as error:  # the lock file is another user's
        raise RunError(_unwritable(folder, error)) from error
    owner = folder / OWNER
    try:
        write_atomically(owner, json.dumps({"pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _without_trace(made: Sequence[Path]) -> Iterator[None]:
    """Take the folders back that were `made` for a command that fails before it has anything to leave in them."""
    try:
        yield
    except BaseException:
        if made and made[0].is_dir() and {path.name for path in made[0].iterdir()} <= {CONFIG, LOCK, OWNER}:
            for name in (CONFIG, LOCK, OWNER):
                (made[0] / name).unlink(missing_ok=True)
            for path in made:
                with suppress(OSError):  # somebody else has begun to use it
                    path.rmdir()
        raise


def _owner(folder: Path) -> str:
    try:
        owner = json.loads(read_text(folder / OWNER))
        return f"process {owner['pid']} since {owner['since']}"
    except UNREADABLE:
        return "another process"  # it has only just begun


@contextmanager
def _in_place(folder: Path) -> Iterator[None]:
    """Raises RunError if the folder is another one at the end: its parts would lie in two places."""
    before = folder.stat()
    try:
        yield
    finally:
        if not folder.is_dir() or not os.path.samestat(before, folder.stat()):
            first = f"delete what is in {folder} now, " if folder.exists() else ""
            raise RunError(
                f"{folder} was renamed, moved or deleted while this command ran; {first}give the folder its name back, "
                "and type the same command"
            )


def _file_inside(folder: Path, error: OSError) -> Path | None:
    """The file of the run folder that an error is about."""
    if not isinstance(error.filename, str | os.PathLike):
        return None
    file = Path(error.filename)
    return file if file.absolute().is_relative_to(folder.absolute()) else None


def _is_of(error: BaseException, numbers: Sequence[int]) -> bool:
    """Whether the system refused for one of these reasons. safetensors tells the number only in its text."""
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)
