"""What `finetune backup` copies, leaves out, finds damaged and writes back."""

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError, RunError
from finetune.run import rundir
from finetune.run.hashing import hash_of
from finetune.workstation import backup_folder as folders
from finetune.workstation.backup import USAGE, backup, check, restore
from tests.conftest import ROOT, Answer
from tests.end_to_end.command import contents

Cli = Callable[..., Answer]
STORED = ROOT / "tests" / "stored"
DEST = Path("disk")
MINE = Path("outputs/mine")


@pytest.fixture
def here(workdir: Path) -> Path:
    """The current folder, with a finished run of images, one of chats, one that isn't finished, and a recipe."""
    shutil.copytree(STORED / "run_pictures", MINE)
    shutil.copytree(STORED / "run_chat", "outputs/multirun/chat")
    shutil.copytree(STORED / "pictures", "pictures")
    (workdir / "conf" / "lora").mkdir(parents=True)
    for name in ("conf/own.yaml", "conf/lora/own.yaml", "outputs/half/config.yaml", "outputs/.cache/rows"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"# {name}\n")
    Path("outputs/half/receipts").mkdir()
    DEST.mkdir()
    return workdir


def saved() -> dict[str, str]:
    """Hash by name of what a backup should hold."""
    found = contents(Path("conf"), MINE, Path("outputs/multirun"), Path("pictures"))
    return {name: sha256 for name, sha256 in found.items() if not name.endswith(".png") or "samples" in name}


def restored(name: str = "", into: str = "again") -> dict[str, str]:
    """Hash by name of what a backup writes into an empty folder."""
    restore(DEST, Path(into), name)
    before = Path.cwd()
    os.chdir(into)
    try:
        return contents(*sorted(Path().iterdir()))
    finally:
        os.chdir(before)


def damage(path: Path) -> None:
    """Another byte, with the same size."""
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def content_of(name: str) -> Path:
    manifest = folders.read(DEST, folders.names(DEST)[-1])
    return folders.content_path(DEST, manifest.files[name].sha256)


def test_finished_runs_recipes_and_captions_come_back_as_they_were(here: Path, finetune_cli: Cli) -> None:
    answer = finetune_cli("backup", "disk")
    assert answer.code == 0
    assert "\n  outputs/half: not finished\n" in answer.out
    assert "\n  cache: a cache; it is made again\n" in answer.out
    assert "\n  pictures: 6 images, yours to copy; their captions are backed up\n" in answer.out
    assert "\n  conversations.jsonl: conversations, yours to copy\n" in answer.out
    assert answer.out.splitlines()[-1] == f"17 3 * * * cd {here} && {sys.executable} -m finetune backup {here}/disk"
    [name] = folders.names(DEST)
    answer = finetune_cli("backup", "disk", "--restore", "again")
    assert answer.out == f"backup {name} of {here} in again: {len(saved())} written, 0 there already\n"
    assert restored() == saved()
    os.chdir("again")
    assert finetune_cli("report", f"run_dir={MINE}").code == 0


def test_only_what_is_new_is_copied(here: Path) -> None:
    first = backup(DEST, here)
    assert first.copied == len(set(saved().values()))
    again = backup(DEST, here)
    assert (again.name, again.copied, again.changed) == (first.name, 0, False)
    before = saved()
    Path("pictures/red.txt").write_text("a red wall, by me")
    shutil.rmtree("outputs/multirun")
    changed = backup(DEST, here)
    assert (changed.copied, changed.copied_bytes, changed.changed) == (1, 17, True)
    assert folders.names(DEST) == [first.name, changed.name]
    assert restored(first.name, "one") == before
    assert restored(into="two") == saved()


def test_a_file_that_is_as_it_was_is_not_read_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (*Path("outputs").rglob("*"), *Path("conf").rglob("*"), *Path("pictures").rglob("*")):
        os.utime(path, ns=(10**18, 10**18))
    monkeypatch.setattr("finetune.run.outputs.trusted", lambda stamp, read_ns: True)  # they were changed just now
    backup(DEST, here)
    read: list[Path] = []
    monkeypatch.setattr("finetune.run.outputs.hash_file", lambda path: read.append(path) or "0" * 64)
    assert not backup(DEST, here).changed
    assert read == []


def test_an_unreadable_file_ends_the_backup_and_the_last_one_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, before = backup(DEST, here), saved()
    Path("conf/new.yaml").write_text("seed: 1")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", failing(PermissionError(13, "Permission denied", "conf/new.yaml")))
        with pytest.raises(RunError, match=r"cannot back up conf/new.yaml \(Permission denied\); the last backup is"):
            backup(DEST, here)
    assert restored(first.name) == before
    assert leftovers(DEST) == []


def test_a_full_disk_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", failing(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"cannot back up .*/disk \(No space left on device\); the last backup is as it"):
        backup(DEST, here)
    assert leftovers(DEST) == []


def test_two_folders_may_share_a_place_of_backups(here: Path) -> None:
    first = backup(DEST, here)
    other = here / "other"
    (other / "conf").mkdir(parents=True)
    (other / "conf" / "own.yaml").write_text("seed: 1")
    assert list(backup(DEST, other).manifest.files) == ["conf/own.yaml"]
    assert restore(DEST, Path("again")).source == str(other)
    (MINE / rundir.OWNER).write_text(json.dumps({"pid": os.getpid(), "since": "now"}))
    again = backup(DEST, here)
    assert again.manifest.files == first.manifest.files
    assert again.copied == 0


def test_a_folder_that_can_not_be_read_ends_the_backup(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "checkpoints":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(RunError, match=r"cannot back up .*/outputs/mine/checkpoints \(Permission denied\); the last"):
        backup(DEST, here)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name != folders.LOCK]


def test_what_changes_while_it_is_copied_ends_the_backup(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.copyfile", lambda source, target: Path(target).write_text("another"))
    with pytest.raises(RunError, match=r"conf/own.yaml is not what it was, or .*disk/content/\w\w does not keep"):
        backup(DEST, here)
    assert folders.names(DEST) == []
    assert leftovers(DEST) == []


def test_a_run_in_use_stays_as_the_last_backup_has_it(here: Path) -> None:
    backup(DEST, here)
    before = saved()
    (MINE / rundir.OWNER).write_text(json.dumps({"pid": os.getpid(), "since": "now"}))
    (MINE / "metrics.jsonl").write_text("half a line")
    Path("conf/new.yaml").write_text("seed: 1")
    made = backup(DEST, here)
    assert made.manifest.left_out[str(MINE)] == "in use; as the last backup has it, if it does"
    assert restored() == before | contents(Path("conf"))


def test_damage_is_found_and_healed_by_the_next_backup(here: Path, finetune_cli: Cli) -> None:
    finetune_cli("backup", "disk")
    count = len(set(saved().values()))
    assert finetune_cli("backup", "disk", "--check").out == f"{count} files of 1 backup: all as they were written\n"
    bad = content_of("conf/own.yaml")
    damage(bad)
    answer = finetune_cli("backup", "disk", "--check")
    assert answer.code == RunError.exit_code
    assert answer.errors[-1].startswith(
        f"error: 1 file of disk missing or damaged, first {bad} (conf/own.yaml); delete"
    )
    answer = finetune_cli("backup", "disk", "--restore", "again")
    assert answer.code == RunError.exit_code
    assert answer.errors[-1].startswith(f"error: 1 file not restored, first again/conf/own.yaml ({bad} is not what it")
    assert len(contents(Path("again"))) == len(saved()) - 1
    bad.unlink()
    assert finetune_cli("backup", "disk", "--check").code == RunError.exit_code
    assert backup(DEST, here).copied == 1
    check(DEST)
    assert restored() == saved()


def test_restoring_replaces_nothing(here: Path, finetune_cli: Cli) -> None:
    finetune_cli("backup", "disk")
    before = saved()
    shutil.rmtree("outputs/multirun")
    Path("conf/own.yaml").write_text("seed: 7")
    Path("pictures/red.txt").unlink()
    Path("pictures/red.txt").symlink_to("nowhere")
    mine = {name: sha256 for name, sha256 in saved().items() if name in before}
    answer = finetune_cli("backup", "disk", "--restore", ".")
    assert answer.code == 0
    assert answer.out.splitlines()[1:] == [
        "there with other content, which stays; restore into an empty folder to have the backup's:",
        "  conf/own.yaml",
        "  pictures/red.txt",
    ]
    assert saved() == {name: sha256 for name, sha256 in before.items() if name != "pictures/red.txt"} | mine
    assert Path("pictures/red.txt").readlink() == Path("nowhere")


def test_captions_from_elsewhere_lie_apart_and_what_has_none_is_named(here: Path, tmp_path_factory: Any) -> None:
    images = tmp_path_factory.mktemp("images")
    shutil.copytree("pictures", images, dirs_exist_ok=True)
    shutil.rmtree("pictures")
    config = MINE / rundir.CONFIG
    written = config.read_text()
    made = backup(DEST, here)
    assert made.manifest.left_out["pictures"].startswith("its captions can't be read: there is no folder")
    config.write_text(
        written.replace("folder: pictures", f"folder: {images}").replace("base: embedded:diffusion", "base: owner/name")
    )
    made = backup(DEST, here)
    assert made.manifest.left_out["owner/name"] == "a base model"
    assert f"outside{images}/red.txt" in made.manifest.files
    assert Path("again/outside", *images.parts[1:], "red.txt").as_posix() in {f"again/{name}" for name in restored()}
    config.write_text("data: [1]")
    made = backup(DEST, here)
    assert "data has no settings" in made.manifest.left_out[f"captions of {MINE}"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--check"],
        ["disk", "again"],
        ["disk", "--restore"],
        ["disk", "--restore", "a", "b", "c"],
        ["disk", "--all"],
    ],
)
def test_other_words_are_refused(words: list[str], finetune_cli: Cli, workdir: Path) -> None:
    answer = finetune_cli("backup", *words)
    assert answer.code == ConfigError.exit_code
    assert answer.errors == [f"error: backup takes a folder and no recipe: {USAGE}; got {' '.join(words) or 'nothing'}"]


def test_the_address_of_another_machine_is_no_folder(finetune_cli: Cli, workdir: Path) -> None:
    answer = finetune_cli("backup", "nas:backup")
    assert answer.code == ConfigError.exit_code
    way = "back up to a folder, then copy that: rclone copy FOLDER nas:backup"
    assert answer.errors == [f"error: nas:backup is no folder of this machine; {way}"]
    assert not Path("nas:backup").exists()


def test_a_folder_that_is_not_there_is_not_made(here: Path) -> None:
    """Else every backup would go onto the system's disk while the other one isn't connected."""
    DEST.rmdir()
    with pytest.raises(RunError, match="connect the disk that it is on, or make it once: mkdir -p"):
        backup(DEST, here)
    assert not DEST.exists()


def test_where_nothing_is_to_be_backed_up_it_says_so(workdir: Path) -> None:
    DEST.mkdir()
    with pytest.raises(RunError, match=r"has no finished run in outputs/ and no recipe in conf/; go where they are"):
        backup(DEST, workdir)
    assert folders.names(DEST) == []


def test_a_run_is_no_place_for_its_own_backup(here: Path) -> None:
    with pytest.raises(RunError, match=r"would back itself up, with .*; choose a folder that no run lies in"):
        backup(MINE, here)


def test_two_backups_at_once_are_refused(here: Path) -> None:
    with folders.opened(DEST), pytest.raises(RunError, match="disk is in use by another backup; wait for it"):
        backup(DEST, here)


def test_a_disk_that_can_not_be_written_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filelock.FileLock.acquire", failing(OSError(30, "Read-only file system")))
    with pytest.raises(RunError, match=r"cannot write in .*disk \(Read-only file system\); choose a folder"):
        backup(DEST, here)


def test_a_backup_that_is_not_there_is_named(here: Path) -> None:
    for act in (lambda: check(DEST), lambda: restore(DEST, here)):
        with pytest.raises(RunError, match="disk holds no backup; make one first: finetune backup disk"):
            act()
    name = backup(DEST, here).name
    with pytest.raises(RunError, match=f"disk holds no backup called yesterday; there are: {name}"):
        restore(DEST, here, "yesterday")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda values: values["left_out"].clear(), "its checksum is another one"),
        (lambda values: values["files"].update({"../x": {}}), r"size|stamp|sha256"),
        (lambda values: values.pop("files"), "files"),
    ],
)
def test_a_damaged_manifest_is_named_and_the_next_backup_needs_none(
    here: Path, change: Callable[[dict[str, Any]], Any], why: str
) -> None:
    name = backup(DEST, here).name
    path = DEST / folders.MANIFESTS / f"{name}.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(
        RunError, match=rf"{name}.json is damaged \(.*({why}).*\); delete it, or name another backup: there is none"
    ):
        restore(DEST, here)
    assert backup(DEST, here).copied == 0
    assert restored() == saved()


@pytest.mark.parametrize(
    ("name", "sha256", "why"),
    [
        ("../x", None, "lies outside"),
        ("/etc/x", None, "lies outside"),
        ("x", "../" * 20 + "etc/hosts", "a hash is none"),
    ],
)
def test_a_manifest_leads_nowhere_else(here: Path, name: str, sha256: str | None, why: str) -> None:
    made = backup(DEST, here)
    values = json.loads(json.dumps(asdict(made.manifest)))
    row = values["files"]["conf/own.yaml"]
    values["files"] = {name: row | {"sha256": sha256 or row["sha256"]}}
    path = DEST / folders.MANIFESTS / f"{made.name}.json"
    path.write_text(json.dumps({"sha256": hash_of(values), **values}))
    with pytest.raises(RunError, match=why):
        restore(DEST, Path("again"))
    assert not Path("again").exists()


def test_two_backups_in_one_second_have_two_names(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = backup(DEST, here)
    Path("conf/own.yaml").write_text("seed: 1")
    monkeypatch.setattr(folders, "datetime", type("Clock", (), {"now": staticmethod(lambda _: Frozen(first.name))}))
    second = backup(DEST, here)
    assert [first.name, second.name] == [first.name, f"{first.name}-1"] == folders.names(DEST)


class Frozen(str):
    def __format__(self, _: str) -> str:
        return str(self)


def test_a_copy_has_the_rights_of_a_new_file(here: Path) -> None:
    backup(DEST, here)
    restore(DEST, Path("again"))
    Path("new").touch()
    assert {stat.S_IMODE(path.stat().st_mode) for path in Path("again").rglob("*") if path.is_file()} == {
        stat.S_IMODE(Path("new").stat().st_mode)
    }
