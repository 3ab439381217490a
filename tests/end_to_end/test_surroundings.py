"""A run where the machine offers less than usual."""

from pathlib import Path

import pytest

from tests.end_to_end import command

CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")


@pytest.mark.exhaustive
def test_a_home_folder_that_is_not_there(workdir: Path, small: list[str]) -> None:
    """As in containers and for service accounts: nothing can be made below it, not even by root."""
    nowhere = {"HOME": "/dev/null/home", **dict.fromkeys(CACHES, "")}
    words = ["env", *(f"--unset={name}" for name in CACHES)]
    (workdir / "images" / "red.txt").unlink()  # the captioner too
    answer = command.run("train", *small, cwd=workdir, before=words, **nowhere)
    assert answer.code == 0, answer.err
    assert "Traceback" not in answer.err
    assert (workdir / "run" / "report.html").exists()
