"""Bodies that nobody would send: every one is answered, and the engine goes on as before."""

import pytest

from scripts.fuzz.serving import COUNT, fuzz
from tests.unit.serving.conftest import Serve


def test_a_field_without_a_visible_name_is_ignored_too(serve: Serve) -> None:
    with serve() as client:
        status, _, headers = client.ask("/chat", {"prompt": "Hello", "max_new_tokens": 1, "\x9c": 1, " \t": 1})
        assert (status, headers["x-finetune-warning"]) == (200, "ignored:   ,")


@pytest.mark.exhaustive
def test_odd_requests_are_answered_and_stop_nothing(serve: Serve) -> None:
    with serve() as client:
        asked = {"prompt": [4, 5, 6], "max_tokens": 8, "temperature": 0}
        before = client.ask("/v1/completions", asked)[1]["choices"]
        found = fuzz(client.url, COUNT)
        assert found.problems == []
        assert found.statuses.total() > 0.8 * COUNT
        assert {200, 400} <= found.statuses.keys()
        assert client.ask("/v1/completions", asked)[1]["choices"] == before
        assert client.metric("vllm:num_requests_running") == 0
