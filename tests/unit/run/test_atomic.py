"""Files and folders that are whole or not there: their rights, and what is left of processes that were killed."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.run.atomic import ABANDONED_S, remove_abandoned, remove_leftovers, replace_folder, write_atomically
from finetune.run.rundir import LEFTOVERS


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_of_a_folder_follows_the_umask(tmp_path: Path, umask: int) -> None:
    with replace_folder(tmp_path / "adapter") as folder:
        (folder / "peft").mkdir()
        for name in ("weights", "peft/weights"):
            (folder / name).write_bytes(b"w")
            (folder / name).chmod(0o600)  # as safetensors does
        (folder / "link").symlink_to(tmp_path / "nowhere")
    write_atomically(tmp_path / "config.yaml", "a: 1")
    files = [tmp_path / "config.yaml", tmp_path / "adapter" / "weights", tmp_path / "adapter" / "peft" / "weights"]
    assert [oct(file.stat().st_mode & 0o777) for file in files] == [oct(0o666 & ~umask)] * 3


def test_leftovers_of_killed_processes_go_and_nothing_else_does(tmp_path: Path) -> None:
    own = [
        *(".config.yaml.4711.tmp", "..lock.json.12.tmp", ".metrics.jsonl.1.tmp", ".report.html.99.tmp"),
        *("receipts/.train.json.5.tmp", ".adapter.tmp/weights", ".samples.old/grid.png"),
        *("checkpoints/.step-000004.tmp/adapter", "samples_more/.0123abcd.tmp/grid.png"),
        "samples_more/.a-big-red-robot-0123ab.tmp/grid.png",
    ]
    others = [
        *("notes.tmp", ".notes.1.tmp", ".config.yaml.tmp.mine", ".adapter.old.txt", "samples/grid.png"),
        *("checkpoints/step-000004/adapter", "checkpoints/.step-mine.tmp", ".adapter", "receipts/.DS_Store"),
    ]
    for name in (*own, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("outside")
    (tmp_path / "checkpoints" / ".step-000005.tmp").symlink_to(elsewhere)
    remove_leftovers(tmp_path, LEFTOVERS)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(others)
    assert (elsewhere / "file").exists()


def test_a_folder_that_was_moved_aside_and_never_replaced_comes_back(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-000004.old").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-000004.old" / "adapter").write_text("whole")
    remove_leftovers(tmp_path, LEFTOVERS)
    assert (tmp_path / "checkpoints" / "step-000004" / "adapter").read_text() == "whole"


def test_where_others_write_too_only_leftovers_go_that_are_old_or_of_ended_processes(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    alive, parent = os.getpid(), os.getppid()
    old, young, left = (tmp_path / f".metadata.jsonl.{number}.tmp" for number in (parent, alive, ended.pid))
    other = tmp_path / ".mine.9.tmp"
    for file in (old, young, left, other):
        file.write_text("half")
    for file in (old, other):
        os.utime(file, (time.time() - ABANDONED_S - 1,) * 2)
    remove_abandoned(tmp_path, r"metadata\.jsonl")
    assert sorted(tmp_path.iterdir()) == sorted([young, other])
    remove_abandoned(tmp_path / "gone", r"metadata\.jsonl")
