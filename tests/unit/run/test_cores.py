"""How many cores a program may use."""

import os

import pytest

from finetune.run.cores import usable_cores


def test_those_that_a_program_is_given_count_and_elsewhere_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 8
