"""Odd values and damaged files through every command: the first cases of `python -m scripts.fuzz`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.fuzz.cases import GROUPS, make
from tests.conftest import ROOT

EACH = 10  # of a group


@pytest.mark.exhaustive
def test_every_case_ends_soon_in_words_and_changes_no_input(tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    words = ("--cases", str(EACH * len(GROUPS)), "--jobs", "2", "--work", str(tmp_path), "--out", str(out))
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "scripts.fuzz", *words], cwd=ROOT, env=alone, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout
    groups = json.loads(out.read_text())["groups"]
    assert {group: row["cases"] for group, row in groups.items()} == dict.fromkeys(sorted(GROUPS), EACH)


def test_a_number_stands_for_one_case() -> None:
    assert [make(3, number).words for number in range(100)] == [make(3, number).words for number in range(100)]
    assert len({make(3, number).words for number in range(0, 200 * len(GROUPS), len(GROUPS))}) > 100
