"""The real command is killed at its file operations: the last good backup, and every file of the user, stay."""

import shutil
from pathlib import Path

import pytest

from finetune.workstation import backup_folder as folders
from finetune.workstation.backup import check, restore
from scripts.torture import commands, operations
from tests.conftest import ROOT
from tests.end_to_end.command import contents

KILLED = -9
PART = 8  # every so many operations; `exhaustive` takes each
BACKUP = ("backup", "disk")
RESTORE = ("backup", "disk", "--restore", "back")


@pytest.fixture(params=[PART, pytest.param(1, marks=pytest.mark.exhaustive)])
def every(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A folder with a small finished run, a recipe and the folder of backups."""
    folder = tmp_path / "start"
    for name in ("config.yaml", "receipts/train.json", "metrics.jsonl", "adapter/README.md"):
        target = folder / "outputs" / "mine" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "tests" / "stored" / "run_chat" / name, target)
    (folder / "conf").mkdir()
    (folder / "conf" / "own.yaml").write_text("seed: 1\n")
    (folder / "disk").mkdir()
    return folder


def killed_at_each(start: Path, line: tuple[str, ...], every: int) -> list[Path]:
    """Copies of the folder in which the command was killed at one operation, and then run to its end."""
    whole = start.with_name("whole")
    shutil.copytree(start, whole, symlinks=True)
    commands.run_to_end(whole, line)
    count = len(operations.read(start.with_name("whole-logs") / f"0-{commands.OPERATIONS}"))
    assert count > 10
    found = []
    for number in range(1, count + 1, every):
        work = start.with_name(f"killed-{number}")
        shutil.copytree(start, work, symlinks=True)
        assert commands.run(work, start.with_name("logs"), line, kill_at=number) == KILLED
        found.append(work)
    return found


def saved(work: Path) -> dict[str, str]:
    return by_name(work, "conf", "outputs")


def by_name(work: Path, *names: str) -> dict[str, str]:
    return {str(Path(path).relative_to(work)): hash_ for path, hash_ in contents(*(work / n for n in names)).items()}


def restored(work: Path, name: str) -> dict[str, str]:
    into = work / f"read-{name}"
    restore(work / "disk", into, name)
    return by_name(into, "conf", "outputs")


def halves(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


def test_a_killed_backup_leaves_the_earlier_ones_and_goes_on(start: Path, every: int) -> None:
    commands.run_to_end(start, BACKUP)
    [first] = folders.names(start / "disk")
    before = saved(start)
    (start / "conf" / "own.yaml").write_text("seed: 2\n")
    (start / "outputs" / "mine" / "metrics.jsonl").write_text("{}\n")
    (start / "outputs" / "mine" / "new.txt").write_text("new\n")
    for work in killed_at_each(start, BACKUP, every):
        assert restored(work, first) == before
        check(work / "disk")
        assert saved(work) == saved(start)
        commands.run_to_end(work, BACKUP)
        check(work / "disk")
        names = folders.names(work / "disk")
        assert len(names) == 2
        assert restored(work, names[-1]) == saved(start)
        assert halves(work) == []


def test_a_killed_first_backup_is_none_or_whole(start: Path, every: int) -> None:
    for work in killed_at_each(start, BACKUP, every):
        for name in folders.names(work / "disk"):
            assert restored(work, name) == saved(start)
        commands.run_to_end(work, BACKUP)
        [name] = folders.names(work / "disk")
        assert restored(work, name) == saved(start)
        assert halves(work) == []


def test_a_killed_restore_replaces_nothing_and_goes_on(start: Path, every: int) -> None:
    commands.run_to_end(start, BACKUP)
    (start / "back" / "conf").mkdir(parents=True)
    (start / "back" / "conf" / "own.yaml").write_text("seed: 3, by me\n")
    disk = contents(start / "disk")
    for work in killed_at_each(start, RESTORE, every):
        assert (work / "back" / "conf" / "own.yaml").read_text() == "seed: 3, by me\n"
        whole = {path: hash_ for path, hash_ in by_name(work / "back", "conf", "outputs").items() if ".tmp" not in path}
        assert {path for path, hash_ in whole.items() if saved(start)[path] != hash_} == {"conf/own.yaml"}
        commands.run_to_end(work, RESTORE)
        assert by_name(work / "back", "outputs") == by_name(start, "outputs")
        assert halves(work) == []
        assert list(contents(work / "disk").values()) == list(disk.values())
