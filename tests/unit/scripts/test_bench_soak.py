"""The soak counts what all its clients got."""

import asyncio

import pytest

from scripts.bench import serving, soak


def test_no_token_is_lost_between_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(_: str, body: dict[str, int]) -> serving.Answered:
        await asyncio.sleep(0)
        return serving.Answered(body["seed"], 0.1, [])

    monkeypatch.setattr(serving, "ask", ask)
    assert asyncio.run(soak.answered("http://127.0.0.1:1", range(100))) == sum(range(100))
