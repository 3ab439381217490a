"""Files that a stage left: a change is found, and what hasn't changed isn't read again."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.run import hashing, outputs
from finetune.run.outputs import compare, outputs_of


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run" / "adapter" / "peft").mkdir(parents=True)
    for name in ("adapter/peft/weights", "adapter/peft/config", "page"):
        (tmp_path / "run" / name).write_bytes(b"content of " + name.encode())
    return tmp_path / "run"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files that are hashed; files of a test are young, and trusted all the same."""
    names: list[str] = []
    monkeypatch.setattr(outputs, "hash_file", lambda path: names.append(path.name) or hashing.hash_file(path))
    monkeypatch.setattr(hashing, "RACY_NS", -(10**12))
    return names


def flip(file: Path) -> None:
    """Another byte, under the same size and modification time."""
    data, times = bytearray(file.read_bytes()), file.stat()
    data[3] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "empty": lambda file: file.write_bytes(b""),
    "gone": Path.unlink,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_change_is_found(run_dir: Path, read: list[str], damage: Callable[[Path], object]) -> None:
    noted = outputs_of(run_dir, [run_dir / "adapter" / "peft", run_dir / "page"])
    assert list(noted) == ["adapter/peft/config", "adapter/peft/weights", "page"]
    damage(run_dir / "adapter" / "peft" / "weights")
    wrong, found = compare(run_dir, noted)
    assert wrong.startswith("adapter/peft/weights ")
    assert found == {}


def test_what_has_not_changed_is_not_read_again(run_dir: Path, read: list[str], tmp_path: Path) -> None:
    noted = outputs_of(run_dir, [run_dir / "adapter", run_dir / "page"])
    read.clear()
    assert compare(run_dir, noted) == ("", noted)
    assert read == []
    (run_dir / "notes.txt").write_text("a person's")
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    wrong, found = compare(copy, noted)
    assert (wrong, sorted(read)) == ("", ["config", "page", "weights"])  # once: the copy's times are noted from then on
    read.clear()
    assert compare(copy, found) == ("", found)
    assert read == []


def test_a_file_that_was_written_just_now_is_read_again(
    run_dir: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "RACY_NS", 10**12)
    noted = outputs_of(run_dir, [run_dir / "page"])
    assert compare(run_dir, noted)[0] == ""
    assert read == ["page", "page"]


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_nothing_outside_the_run_folder_is_an_output(run_dir: Path, read: list[str], name: str) -> None:
    (run_dir.parent / "secret").write_text("s")
    noted = outputs_of(run_dir, [run_dir / "page"])
    assert compare(run_dir, {name: noted["page"]})[0]
