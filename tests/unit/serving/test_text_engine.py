"""The engine: what a step that fails costs, who waits and who goes first."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.language.causal_lm import load_tokenizer
from finetune.serving.requests import BASE, Delta, Finish, Refused, TextRequest
from finetune.serving.text_engine import TextEngine

END = 2


class Counting:
    """A batch that says the token after the last one of each row; some ids make it fail."""

    def __init__(self, poison: int = -1, memory: int = 10**6) -> None:
        self.poison, self.memory = poison, memory
        self.rows: list[int] = []
        self.most = 0
        self.forgot = False

    def join(self, rows: Sequence[Sequence[int]], adapters: Sequence[str]) -> Tensor:
        assert len(adapters) == len(rows)
        self.rows += [row[-1] for row in rows]
        return self._logits()[-len(rows) :]

    def step(self, tokens: Sequence[int]) -> Tensor:
        assert len(tokens) == len(self.rows)
        self.rows = list(tokens)
        return self._logits()

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def forget(self) -> None:
        self.forgot = True

    def _logits(self) -> Tensor:
        if self.poison in self.rows:
            raise ValueError("poison")
        if len(self.rows) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.most = max(self.most, len(self.rows))
        return torch.nn.functional.one_hot(torch.tensor(self.rows) + 1, 1500).float()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("embedded:language")


@pytest.fixture
def engines(tokenizer: Any) -> Iterator[Any]:
    made: list[TextEngine] = []

    def make(batch: Counting, most_rows: int = 8, most_waiting: int = 100) -> TextEngine:
        made.append(TextEngine(batch, tokenizer, [END], most_rows=most_rows, most_waiting=most_waiting))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def request(first: int, most: int = 20, timeout_s: float = 60.0) -> TextRequest:
    return TextRequest((first,), BASE, most, 0.0, 1.0, 0, 0, (), timeout_s)


async def last(reply: Any) -> Delta:
    async for delta in reply:
        found: Delta = delta
    return found


def replies(engine: TextEngine, requests: Sequence[TextRequest]) -> list[Delta]:
    async def ask() -> list[Delta]:
        return await asyncio.gather(*[last(engine.submit(each)) for each in requests])

    return asyncio.run(ask())


def test_a_row_that_fails_ends_alone(engines: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it fails at once or after some tokens."""
    engine = engines(Counting(poison=500))
    found = replies(engine, [request(first) for first in (100, 500, 200, 495, 300, 600, 700)])
    assert [delta.finish for delta in found] == [
        *(Finish.length, Finish.error, Finish.length, Finish.error, Finish.length, Finish.length, Finish.length)
    ]
    assert all(delta.tokens == 20 for delta in found if delta.finish is Finish.length)
    assert "serve: a step of " in capsys.readouterr().err
    assert replies(engine, [request(100)] * 8)[0].finish is Finish.length, "it goes on"


def test_short_memory_makes_the_batch_smaller_and_loses_nothing(engines: Any) -> None:
    batch = Counting(memory=3)
    engine = engines(batch)
    found = replies(engine, [request(100 * index) for index in range(1, 13)])
    assert {(delta.finish, delta.tokens) for delta in found} == {(Finish.length, 20)}
    assert engine.limit <= batch.most <= 3
    assert batch.forgot, "what isn't a row's goes first"


def test_replies_end_at_the_end_token_and_it_counts(engines: Any) -> None:
    (found,) = replies(engines(Counting()), [request(0)])
    assert (found.finish, found.tokens) == (Finish.stop, 2)


def test_a_reply_that_has_ended_is_not_running(engines: Any) -> None:
    """From the moment its client knows: a batch that is slow to drop its row makes no difference."""
    may_drop = threading.Event()

    class Slow(Counting):
        def keep(self, rows: Sequence[int]) -> None:
            assert may_drop.wait(60)
            super().keep(rows)

    engine = engines(Slow())
    assert replies(engine, [request(100)])[0].finish is Finish.length
    assert engine.stats().running == 0
    may_drop.set()


def test_more_than_may_wait_are_refused_with_a_time(engines: Any) -> None:
    engine = engines(Counting(), most_rows=2, most_waiting=1)

    async def ask() -> None:
        taken = [engine.submit(request(100, most=1000)) for _ in range(3)]
        with pytest.raises(Refused, match=r"waiting already: [0-9]+ request") as refused:
            engine.submit(request(100))
        assert refused.value.status == 429
        assert int(refused.value.headers()["Retry-After"]) >= 1
        for reply in taken:
            reply.cancel()
        while engine.stats().running or engine.stats().waiting:
            await asyncio.sleep(0.001)
        assert (await last(engine.submit(request(100)))).tokens == 20

    asyncio.run(ask())


def test_time_runs_out_for_those_that_wait_too(engines: Any) -> None:
    found = replies(engines(Counting(), most_rows=1), [request(100, 400), request(100, 400, timeout_s=0.0)])
    assert [delta.finish for delta in found] == [Finish.length, Finish.deadline]


def test_a_closed_engine_takes_nothing_more_and_finishes_the_rest(engines: Any) -> None:
    engine = engines(Counting())

    async def ask() -> Delta:
        reply = engine.submit(request(100, 300))
        await asyncio.to_thread(engine.close)
        with pytest.raises(Refused, match="shutting down") as refused:
            engine.submit(request(100))
        assert refused.value.status == 503
        return await last(reply)

    assert asyncio.run(ask()).tokens == 300


def test_work_between_steps_is_done_and_its_error_is_the_callers(engines: Any) -> None:
    engine = engines(Counting())

    def fail() -> None:
        raise KeyError("x")

    async def ask() -> None:
        reply = engine.submit(request(100, 300))
        assert await engine.between_steps(lambda: 5) == 5
        with pytest.raises(KeyError):
            await engine.between_steps(fail)
        assert (await last(reply)).tokens == 300

    asyncio.run(ask())


def test_a_client_with_many_requests_does_not_keep_others_from_their_turn(engines: Any) -> None:
    """A hundred of one, all there before the first of another."""
    engine = engines(Counting(), most_rows=2, most_waiting=100)
    ended: list[str] = []

    async def ask(client: str) -> None:
        await last(engine.submit(replace(request(100), client=client)))
        ended.append(client)

    async def all_of_them() -> None:
        many = [asyncio.create_task(ask("many")) for _ in range(100)]
        await asyncio.sleep(0)
        await asyncio.gather(*many, *[asyncio.create_task(ask("few")) for _ in range(3)])

    asyncio.run(all_of_them())
    assert sum(client == "few" for client in ended[:12]) == 3
    assert len(ended) == 103


def test_a_queue_is_full_for_the_client_that_filled_it(engines: Any) -> None:
    engine = engines(Counting(), most_rows=1, most_waiting=2)

    async def ask() -> None:
        taken = [engine.submit(replace(request(100, most=1000), client="many")) for _ in range(3)]
        with pytest.raises(Refused, match=r"waiting already: [0-9]+ request"):
            engine.submit(replace(request(100), client="many"))
        other = engine.submit(replace(request(100), client="few"))
        for reply in taken:
            reply.cancel()
        assert (await last(other)).tokens == 20

    asyncio.run(ask())
