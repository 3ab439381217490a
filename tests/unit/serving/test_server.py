"""How many cores a server computes on."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.serving import server


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("leaves", "wish", "threads"), [(True, "", 3), (True, "2", 2), (False, "", 2)])
@pytest.mark.usefixtures("two_threads")
def test_a_core_is_left_for_the_requests_unless_the_user_says_how_many_compute(
    monkeypatch: pytest.MonkeyPatch, leaves: bool, wish: str, threads: int
) -> None:
    seen = []

    async def serve(*_: Any) -> None:
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(server, "_serve", serve)
    monkeypatch.setattr(server, "usable_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wish:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    unused: Any = SimpleNamespace(leaves_a_core=leaves)
    server.run(unused, unused, unused, unused)
    assert seen == [threads]
