"""Damage in a run's samples/, and what it is like when they are made again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def cut(name: str) -> Callable[[Path], None]:
    """Half of a file is gone."""

    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """What `make` makes is in a file's place."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_made_again(finetune_cli: Callable[..., Any], run_dir: Path, whole: dict[str, bytes], *, keeps: bool) -> None:
    """By `sample`, the same files as before; what may be a person's is beside them."""
    assert finetune_cli("sample", f"run_dir={run_dir}").code == 0
    assert contents(run_dir / "samples") == whole
    assert (run_dir / "samples-kept-1").exists() == keeps
    assert sorted(path.name for path in run_dir.glob(".samples*")) == []
