"""Jobs of images: one after another, each ends by itself, with time, with its client, or with an error."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from finetune.serving.image_engine import Drawn, ImageEngine, ImageRequest
from finetune.serving.requests import BASE, Finish, Refused


class Painter:
    """Paints a word in steps; waits at the first one until it may go on."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.at_work = threading.Event()
        self.finished: list[str] = []

    def draw(self, request: ImageRequest, on_step: Callable[[], None]) -> tuple[Sequence[Any], str]:
        self.at_work.set()
        assert self.go.wait(60)
        if request.prompt == "broken":
            raise ValueError("no such colour")
        for _ in range(request.steps):
            on_step()
        self.finished.append(request.prompt)
        return [request.prompt] * len(request.seeds), ""


@pytest.fixture
def painter() -> Painter:
    return Painter()


@pytest.fixture
def engine(painter: Painter) -> Iterator[ImageEngine]:
    made = ImageEngine(painter, most_waiting=2)
    yield made
    painter.go.set()
    made.close()


def request(prompt: str, timeout_s: float = 60.0) -> ImageRequest:
    return ImageRequest(prompt, "", BASE, (0, 1), 3, 1.0, 16, 16, timeout_s)


async def last(job: Any) -> Drawn:
    async for news in job:
        found: Drawn = news
    return found


def test_jobs_end_each_in_its_own_way(engine: ImageEngine, painter: Painter) -> None:
    async def ask() -> None:
        first = engine.submit(request("first"))
        await asyncio.to_thread(painter.at_work.wait, 60)
        broken, late = engine.submit(request("broken")), engine.submit(request("late", timeout_s=0.0))
        with pytest.raises(Refused, match="waiting already: 2 jobs") as refused:
            engine.submit(request("too many"))
        assert int(refused.value.headers()["Retry-After"]) >= 1
        painter.go.set()
        news = [drawn async for drawn in first]
        assert [(drawn.step, drawn.finish) for drawn in news] == [(1, None), (2, None), (3, None), (3, Finish.stop)]
        assert news[-1].images == ("first", "first")
        assert (await last(broken)).finish is Finish.error
        assert (await last(late)).finish is Finish.deadline
        assert (await last(engine.submit(request("next")))).finish is Finish.stop
        assert engine.stats().running == 0

    asyncio.run(ask())
    assert painter.finished == ["first", "next"]


def test_a_job_that_nobody_waits_for_is_not_finished(engine: ImageEngine, painter: Painter) -> None:
    async def ask() -> None:
        running = engine.submit(request("running"))
        await asyncio.to_thread(painter.at_work.wait, 60)
        waiting = engine.submit(request("waiting"))
        running.cancel()
        waiting.cancel()
        painter.go.set()
        assert (await last(engine.submit(request("next")))).finish is Finish.stop

    asyncio.run(ask())
    assert painter.finished == ["next"]


def test_a_closed_engine_finishes_what_waits(engine: ImageEngine, painter: Painter) -> None:
    async def ask() -> None:
        job = engine.submit(request("last"))
        painter.go.set()
        await asyncio.to_thread(engine.close)
        with pytest.raises(Refused, match="shutting down"):
            engine.submit(request("more"))
        assert (await last(job)).finish is Finish.stop

    asyncio.run(ask())
