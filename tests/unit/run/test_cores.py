"""How many cores a program may use."""

import os

import pytest

from finetune.run.cores import usable_cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux alone says it of each program")
def test_those_that_a_program_is_given_count_and_elsewhere_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()
