"""Clients with keys of their own, over HTTP: who they are, and what each may ask for in a minute."""

from finetune.serving.fairness import Rates
from finetune.serving.keys import hash_of_key
from tests.end_to_end.serving import Client
from tests.unit.serving.conftest import Serve

KEYS = {hash_of_key(name * 3): name for name in ("ann", "ben")}
SHORT = {"prompt": "Hello", "max_new_tokens": 2}


def test_each_key_has_a_minute_of_its_own(serve: Serve) -> None:
    with serve(KEYS, Rates(2, 0)) as anybody:
        assert anybody.ask("/chat", SHORT)[0] == 401
        ann, ben = (Client(anybody.url, name * 3) for name in ("ann", "ben"))
        assert [ann.ask("/chat", SHORT)[0], ann.ask("/stream_chat?prompt=x&max_new_tokens=1")[0]] == [200, 200]
        status, answer, headers = ann.ask("/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (
            429,
            "rate_limit_error",
            "rate_limit_exceeded",
        )
        assert answer["error"]["message"] == (
            "this server gives a client 2 requests a minute (serve.requests_per_minute)"
        )
        assert 0 < int(headers["retry-after"]) <= 30
        assert headers["x-should-retry"] == "true"
        assert ben.ask("/chat", SHORT)[0] == 200
        assert ann.ask("/v1/models")[0] == 200, "what costs nothing isn't counted"


def test_tokens_are_counted_as_they_were_read_and_written(serve: Serve) -> None:
    """And not as they were asked for, nor for what was refused. Time stands still."""
    asked = {"prompt": [4, 5, 6], "max_tokens": 32}
    with serve(rates=Rates(0, 200, now=lambda: 0.0)) as client:
        used, status, answer = 0, 200, {}
        while status == 200:
            assert client.ask("/v1/completions", {"prompt": [4] * 300, "max_tokens": 1})[0] == 400
            status, answer, _ = client.ask("/v1/completions", asked)
            used += answer["usage"]["total_tokens"] if status == 200 else 0
        assert 200 - 35 < used <= 200
        assert answer["error"]["message"] == "this server gives a client 200 tokens a minute (serve.tokens_per_minute)"
        assert client.ask("/v1/completions", {"prompt": [4], "max_tokens": 200 - used - 1})[0] == 200
