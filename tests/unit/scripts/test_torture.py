"""The hook that kills, and the comparison: what they count and what they notice."""

import json
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from scripts.torture.__main__ import _counts, _print_counts
from scripts.torture.operations import Operation, read
from scripts.torture.outcome import differences, outcome
from scripts.torture.trials import Result
from tests.conftest import ROOT

WORK = """
import os, sys
from pathlib import Path
from scripts.torture.operations import Operations
Operations(Path(sys.argv[1]), int(sys.argv[2])).start()
Path("folder").mkdir()
with open("folder/a", "w") as file:
    file.write("0123456789")
    file.flush()
    os.fsync(file.fileno())
Path("folder/a").replace("b")
Path("/dev/null").write_text("not counted")
Path("b").read_text()
Path("b").unlink()
"""
NAMES = ["mkdir", "open", "write", "fsync", "rename", "remove"]


def run(work, kill_at):
    """Exit code and what was counted."""
    work.mkdir()
    log = work.parent / f"{work.name}.log"
    ended = subprocess.run(
        [sys.executable, "-c", WORK, str(log), str(kill_at)], cwd=work, env={"PYTHONPATH": str(ROOT)}, process_group=0
    )
    return ended.returncode, read(log)


def test_every_operation_below_the_folder_is_counted_once(tmp_path):
    code, operations = run(tmp_path / "work", 0)
    assert code == 0
    assert [operation.name for operation in operations] == NAMES
    assert operations[2] == Operation("run folder", "write", "folder/a")


@pytest.mark.parametrize(
    ("kill_at", "left"),
    [(1, {}), (2, {}), (3, {"folder/a": "01234"}), (4, {"folder/a": "0123456789"}), (6, {"b": "0123456789"})],
)
def test_a_kill_is_before_its_operation_and_in_the_middle_of_a_write(tmp_path, kill_at, left):
    work = tmp_path / "work"
    code, operations = run(work, kill_at)
    assert code == -signal.SIGKILL
    assert len(operations) == kill_at
    assert {str(path.relative_to(work)): path.read_text() for path in work.rglob("*") if path.is_file()} == left


def test_times_and_places_are_not_compared_and_all_else_is(tmp_path):
    def left(name, *, loss=0.5, seconds=1.0, weight=1.0, extra=False):
        folder = tmp_path / name
        (folder / "run").mkdir(parents=True)
        line = {"step": 1, "loss/step": loss, "train/seconds": seconds, "file": str(folder / "run" / "x")}
        (folder / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        save_file({"a": torch.full((2,), weight)}, folder / "run" / "adapter.safetensors")
        if extra:
            (folder / "run" / ".x.tmp").write_text("")
        return outcome(folder)

    first = left("first")
    assert differences(first, left("second", seconds=2.0)) == []
    assert differences(first, left("third", loss=0.6)) == ["run/metrics.jsonl differs"]
    assert differences(first, left("fourth", weight=1.0000001)) == ["run/adapter.safetensors differs"]
    assert differences(first, left("fifth", extra=True)) == ["run/.x.tmp should not be there"]
    assert differences(left("sixth", extra=True), first) == ["run/.x.tmp is missing"]


def test_what_was_killed_and_what_ended_before_is_counted(capsys):
    results = [
        Result("image train", 0, Counter(train=2, export=1)),
        Result("image train", 1, Counter(train=1), missed=1, faults=["run/a differs"]),
        Result("language report", 2, missed=1),
        Result("language report", 3, Counter(report=1), plain=1),
    ]
    counts = _counts(results) | {"seconds": 9}
    assert (counts["kills"], counts["ended before their kill"], counts["of programs of their own"]) == (5, 2, 1)
    assert (counts["trials"], counts["trials killed"], len(counts["failed"])) == (4, 3, 1)
    _print_counts(counts)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "7 starts to be killed: 5 killed, 2 ended before their kill",
        "4 trials, 9 s: 3 killed, 1 never, 1 failed",
    ]
