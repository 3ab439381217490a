"""No client keeps another from its turn, or uses more than it may."""

import random

import pytest

from finetune.serving.fairness import FairQueue, Rates
from finetune.serving.requests import Refused


def test_clients_take_turns_and_each_keeps_its_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for index in range(4):
        queue.put("a", f"a{index}")
    queue.put("b", "b0")
    assert [queue.take() for _ in range(2)] == ["a0", "b0"]
    queue.put("b", "b1")
    queue.put("c", "c0")
    assert (len(queue), queue.count("a"), queue.count("nobody")) == (5, 3, 0)
    queue.put_back(["x", "y"])
    assert queue.first() == "x"
    assert [queue.take() for _ in range(len(queue))] == ["x", "y", "a1", "b1", "c0", "a2", "a3"]


def test_whatever_comes_nobody_waits_longer_than_one_turn_of_all() -> None:
    draw, queue = random.Random(0), FairQueue[str]()
    waited: dict[str, int] = {}
    for _ in range(3000):
        if draw.random() < 0.55:
            queue.put(client := draw.choice("aaaaaaaaaabcd"), client)
        elif len(queue):
            taken = queue.take()
            waited = {client: waited.get(client, 0) + 1 for client in "abcd" if queue.count(client) and client != taken}
            assert max(waited.values(), default=0) < 4
    while len(queue):
        queue.take()


class Clock:
    """Seconds as the test says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def wait_s(rates: Rates, client: str, what: str, amount: int) -> int:
    """How long a client that may not is told to wait; 0 if it may."""
    try:
        rates.use(client, what, amount)
        return 0
    except Refused as refused:
        return int(refused.headers()["Retry-After"])


def test_a_client_may_use_so_much_in_any_minute_and_the_wait_it_is_told_is_enough() -> None:
    clock = Clock()
    rates = Rates(10, 600, clock)
    assert [wait_s(rates, "a", "requests", 1) for _ in range(11)] == [0] * 10 + [6]
    assert wait_s(rates, "b", "requests", 1) == 0, "another client has its own"
    clock.now += 5
    assert wait_s(rates, "a", "requests", 1) == 1
    clock.now += 1
    assert wait_s(rates, "a", "requests", 1) == 0
    clock.now += 3600
    assert sum(not wait_s(rates, "a", "requests", 1) for _ in range(30)) == 10, "an hour of rest is worth a minute"


def test_what_was_not_used_is_given_back_and_a_large_request_waits_for_all_of_it() -> None:
    clock = Clock()
    rates = Rates(0, 600, clock)
    assert wait_s(rates, "a", "requests", 10**9) == 0, "no limit"
    assert wait_s(rates, "a", "tokens", 500) == 0
    assert wait_s(rates, "a", "tokens", 200) == 10
    rates.give_back("a", "tokens", 450)
    assert wait_s(rates, "a", "tokens", 200) == 0
    assert wait_s(rates, "a", "tokens", 5000) == 25, "when all is there"
    clock.now += 25
    assert wait_s(rates, "a", "tokens", 5000) == 0
    assert wait_s(rates, "a", "tokens", 1) == 441, "it counts in full"
    with pytest.raises(Refused, match=r"gives a client 600 tokens a minute \(serve\.tokens_per_minute\)") as error:
        rates.use("a", "tokens", 1)
    assert (error.value.status, error.value.code) == (429, "rate_limit_exceeded")
