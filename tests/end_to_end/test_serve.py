"""`finetune serve` with a language model, as its clients see it: over HTTP, in a process of its own."""

import asyncio
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import openai
import pytest
from playwright.sync_api import Browser, expect

from finetune.run import rundir
from scripts.bench import serving as stopwatch
from tests.end_to_end.serving import Server, complaints, other_adapter, serving, train

PROMPT = "How much is 2 plus 3?"
TURNS: Any = [{"role": "user", "content": PROMPT}]
DRIVEL = "base:drivel"  # an adapter with which replies hardly ever end by themselves


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    run = train(folder)
    for seed, name in ((1, "drivel"), (2, "babble")):
        other_adapter(run, folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def server(work: Path) -> Iterator[Server]:
    with serving(
        work, "serve.adapters={drivel:drivel,second:babble}", "serve.queue=64", "serve.max_body_kib=64"
    ) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_says_what_it_serves_and_how_to_ask(server: Server) -> None:
    first = server.said.splitlines()[0]
    assert first == ("serve: models base:pirate_chat, base:drivel, base:second, base, and 2 checkpoints as NAME@step-N")
    assert f"curl {server.url}/chat" in server.said
    assert "model='base:pirate_chat'" in server.said


@pytest.mark.exhaustive
def test_a_fresh_recipe_serves_its_base_and_says_how_to_train(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert server.said.splitlines()[0] == (
            "serve: no adapter in outputs/pirate_chat yet, the base answers alone; "
            "train one: finetune train conf=pirate_chat hardware.device=cpu"
        )
        _, models, _ = server.ask("/v1/models")
        assert [model["id"] for model in models["data"]] == ["base"]
        _, answer, _ = server.ask("/chat", {"prompt": PROMPT, "temperature": 0})
        assert answer["response"] == "2 plus 3 is 5."
        assert list(tmp_path.rglob("*")) == [], "a base alone leaves nothing behind"


def test_the_official_client_chats(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[:4] == ["base:pirate_chat", "base:drivel", "base:second", "base"]
    found = client.chat.completions.create(model="base", messages=TURNS, temperature=0)
    assert found.choices[0].message.content == "2 plus 3 is 5."
    assert found.choices[0].finish_reason == "stop"
    assert found.usage
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    cut = client.chat.completions.create(model="base", messages=TURNS, temperature=0, max_completion_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage
    assert cut.usage.completion_tokens == 2


def test_the_official_client_streams_the_same_words(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=DRIVEL, messages=TURNS, seed=4, max_tokens=20)
    stream = client.chat.completions.create(
        model=DRIVEL, messages=TURNS, seed=4, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5, "word by word"
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


def test_the_official_client_completes_texts_and_ids(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="base", prompt="<|user|>Hello<|end|><|assistant|>", temperature=0)
    assert whole.choices[0].text
    streamed = client.completions.create(
        model="base", prompt="<|user|>Hello<|end|><|assistant|>", temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    by_ids = client.completions.create(model="base", prompt=[4, 5, 6], max_tokens=1)
    assert by_ids.usage
    assert by_ids.usage.prompt_tokens == 3


def test_the_official_client_understands_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'; this server has base:pirate_chat") as no:
        client.chat.completions.create(model="gpt-9", messages=TURNS)
    assert no.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"a system message may only come first") as refused:
        client.chat.completions.create(model="base", messages=[*TURNS, {"role": "system", "content": "x"}])
    assert "skip_bad" not in str(refused.value)
    with pytest.raises(openai.BadRequestError, match=r"tokens, and this model reads 512 with the reply") as long:
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "word " * 600}])
    assert long.value.code == "context_length_exceeded"


def test_a_stop_text_ends_a_reply_before_it(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="base", messages=TURNS, temperature=0, stop=["is 5"])
    assert found.choices[0].message.content == "2 plus 3 "
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "messages: Field required"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": TURNS, "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"messages": TURNS, "top_p": 0}, "top_p", "greater than 0"),
        ({"messages": TURNS, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": TURNS, "seed": 2**70}, "seed", "less than or equal to"),
        ({"messages": TURNS, "n": 2}, "n", "n=2 is not supported"),
        ({"messages": TURNS, "stop": ["x"] * 99}, "stop", "stop takes at most 16 texts"),
        ({"messages": TURNS, "stop": ""}, "stop", "of 1 to 200 characters"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "Input should be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "messages[0] has content of type image_url, and this model reads text alone",
        ),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', None, ""),
        (b"{not json", None, ""),
        (b"[" * 50_000, None, ""),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature", ""),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, str) else "",
)
def test_what_can_not_be_answered_is_refused_in_the_clients_language(
    server: Server, body: Any, param: str | None, words: str
) -> None:
    status, answer, headers = server.ask("/v1/chat/completions", body)
    assert status == 400
    assert words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert param is None or answer["error"]["param"] == param
    assert headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "prompt takes one text"),
        (["a", "b"], "prompt takes one text"),
        ("", "holds no token"),
        ([99_999], "a token that this model doesn't know"),
        ([-1], "a token that this model doesn't know"),
    ],
)
def test_prompts_that_are_none(server: Server, prompt: Any, words: str) -> None:
    status, answer, _ = server.ask("/v1/completions", {"prompt": prompt})
    assert status == 400
    assert words in answer["error"]["message"]


def test_what_a_chat_page_sends_besides_is_ignored_and_named(server: Server) -> None:
    """As Open WebUI does: settings of other servers, and its own records."""
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "stream": False,
        "temperature": 0,
        "min_p": 0.05,
        "repeat_penalty": 1.1,
        "metadata": {"chat_id": "1"},
        "tools": [],
        "max_tokens": 100_000,
    }
    status, answer, headers = server.ask("/v1/chat/completions", body)
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "2 plus 3 is 5."
    warning = headers["x-finetune-warning"]
    assert warning.startswith("ignored: metadata, min_p, repeat_penalty; at most ")
    assert warning.endswith("tokens are written, not 100000")


def test_chat_goes_on_from_its_history(server: Server) -> None:
    status, first, headers = server.ask("/chat", {"prompt": PROMPT, "history": [], "model": "base", "temperature": 0})
    assert status == 200
    assert first["response"] == "2 plus 3 is 5."
    assert first["history"] == [[PROMPT, first["response"]]]
    assert headers["x-finetune-content"] == first["content"]
    _, second, _ = server.ask("/chat", {"prompt": "Hello", "history": first["history"], "model": "base"})
    assert second["history"][0] == first["history"][0]
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]


def events(server: Server, path: str, body: Any = None) -> list[Any]:
    _, text, headers = server.ask(path, body)
    assert headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in str(text).split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_stream_chat_sends_the_same_reply_piece_by_piece(server: Server) -> None:
    history = [["Hello", "Hi!"]]
    asked = {"prompt": PROMPT, "history": history, "model": DRIVEL, "seed": 1, "max_new_tokens": 12}
    _, whole, _ = server.ask("/chat", asked)
    path = f"/stream_chat?prompt={quote(PROMPT)}&history={quote(json.dumps(history))}&model={DRIVEL}"
    found = events(server, f"{path}&seed=1&max_new_tokens=12")
    assert "".join(event["delta"] for event in found) == whole["response"]
    assert {key: found[-1][key] for key in whole} == whole
    assert [event["finished"] for event in found] == [False] * (len(found) - 1) + [True]


@pytest.mark.parametrize("history", ["{", "[[1]]", '["x"]', "[" * 9999])
def test_a_history_that_is_none_is_refused(server: Server, history: str) -> None:
    status, answer, _ = server.ask(f"/stream_chat?prompt=x&history={quote(history)}")
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_health_and_unknown_routes(server: Server) -> None:
    assert server.ask("/healthz")[:2] == (200, {"status": "ok"})
    assert server.ask("/readyz")[:2] == (200, {"status": "ready"})
    status, answer, _ = server.ask("/v1/embeddings", {"input": "x"})
    assert (status, answer["error"]["code"]) == (404, "not_found")
    status, answer, _ = server.ask("/chat")
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")


def test_metrics_count_replies(server: Server) -> None:
    name = 'vllm:request_success_total{finished_reason="length"}'
    server.ask("/chat", {"prompt": PROMPT, "model": DRIVEL, "temperature": 0, "max_new_tokens": 3})
    before, written = server.metric(name), server.metric("vllm:generation_tokens_total")
    server.ask("/chat", {"prompt": PROMPT, "model": DRIVEL, "temperature": 0, "max_new_tokens": 5})
    assert server.metric(name) == before + 1
    assert server.metric("vllm:generation_tokens_total") == written + 5


@pytest.mark.exhaustive
def test_an_adapter_is_known_by_its_content_and_steps_have_their_own(server: Server) -> None:
    names = ["base", "base:pirate_chat", "base:pirate_chat@step-1", DRIVEL, "base:second"]
    contents = [server.ask("/chat", {"prompt": "x", "model": name})[1]["content"] for name in names]
    assert len(set(contents)) == len(names)
    assert all(content.startswith(contents[0]) for content in contents), "each names the base"
    assert [server.ask(f"/v1/models/{name}")[1]["content"] for name in names] == contents


@pytest.mark.parametrize(
    "name", ["", "base:", "base:drivel@step-1", "base:pirate_chat@step-7", "base:../../x", "drivel"]
)
def test_there_is_no_other_model(server: Server, name: str) -> None:
    status, answer, _ = server.ask("/chat", {"prompt": "x", "model": name or " "})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_a_hundred_requests_at_once_never_mix_adapters(server: Server) -> None:
    """Half of them greedy, half drawn with a seed; each as it is alone."""
    models = ["base", "base:pirate_chat", DRIVEL, "base:second"]
    kinds = [
        {"prompt": PROMPT, "model": model, "seed": seed, "temperature": heat, "max_new_tokens": 10 + 5 * seed}
        for model in models
        for seed, heat in enumerate((0, 1.0, 1.5))
    ]
    alone = [server.ask("/chat", kind)[1] for kind in kinds]
    assert len({answer["response"] for answer in alone}) >= 7, "they can be told apart, but for a run of two steps"
    with ThreadPoolExecutor(32) as clients:
        found = list(clients.map(lambda index: server.ask("/chat", kinds[index % len(kinds)])[1], range(108)))
    assert found == [alone[index % len(kinds)] for index in range(108)]


def test_the_stopwatch_counts_what_is_written(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "REQUESTS", 5)
    before = server.metric("vllm:generation_tokens_total")
    _, found = asyncio.run(stopwatch.level(server.url, 3))
    assert len(found) == 5
    assert sum(each.tokens for each in found) == server.metric("vllm:generation_tokens_total") - before
    assert all(len(each.gaps_s) < each.tokens for each in found)


def test_a_person_chats_edits_and_finds_the_chats_again(server: Server, browser: Browser) -> None:
    page = browser.new_page()
    wrong = complaints(page)
    page.goto(server.url)
    message, replies = page.get_by_label("Message"), page.locator(".replies p")
    page.get_by_label("Beside the base").check()
    page.get_by_label("Seed").fill("1")
    message.fill(PROMPT)
    message.press("Enter")
    expect(replies).to_have_text(["2 plus 3 is 5.", re.compile(".")])
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    page.get_by_label("Beside the base").uncheck()
    page.get_by_label("Model").select_option("base")
    page.get_by_role("button", name=f"Edit: {PROMPT}").click()
    expect(message).to_have_value(PROMPT)
    message.fill("How much is 4 plus 3?")
    message.press("Enter")
    expect(replies).to_have_text(["4 plus 3 is 7."])

    page.get_by_label("Model").select_option(DRIVEL)
    message.fill("<img src=x onerror=alert(1)>")
    message.press("Enter")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("stopped")).to_be_visible()
    expect(page.locator(".asked").last).to_have_text("<img src=x onerror=alert(1)>")
    page.reload()
    page.get_by_role("button", name=PROMPT, exact=True).click()
    expect(replies.first).to_have_text("2 plus 3 is 5.")
    assert wrong == []


def test_a_person_looks_at_the_machine(server: Server, work: Path, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 380, "height": 800}, color_scheme="dark")
    wrong = complaints(page)
    with rundir.held(work / "outputs/pirate_chat", {"seed": 0}):
        page.goto(server.url)
        page.get_by_role("link", name="Machine").click()
        expect(page.get_by_role("meter", name="CPU", exact=True)).to_be_visible()
        expect(page.get_by_role("img", name="Memory in use, GiB")).to_be_visible()
        expect(page.get_by_text(re.compile(r"\d+ of \d+ checks are fine"))).to_be_visible()
        found = server.ask("/api/machine")[1]
        serious = [each for each in found["health"]["findings"] if each["verdict"] != "unknown"]
        expect(page.locator("#findings > li")).to_have_count(len(serious))
        expect(page.locator("#no-gpu")).to_be_visible(visible=bool(found["no_gpu"]))
        assert page.evaluate("document.documentElement.scrollWidth") == 380, "nothing is wider than a phone"
        page.get_by_role("link", name="run pirate_chat").press("Enter")
        expect(page.get_by_role("heading", name="pirate_chat")).to_be_visible()
    assert wrong == []


def test_a_client_that_goes_away_stops_costing(server: Server) -> None:
    before = server.metric("vllm:generation_tokens_total")
    for stream in (True, False):
        asked = {"messages": TURNS, "model": DRIVEL, "temperature": 0, "stream": stream, "max_tokens": 450}
        with server.connect("/v1/chat/completions", asked):
            while server.metric("vllm:num_requests_running") != 1:
                time.sleep(0.005)
        while server.metric("vllm:num_requests_running"):
            time.sleep(0.005)
    assert server.metric("vllm:generation_tokens_total") - before < 2 * 450


@pytest.mark.exhaustive
def test_a_full_queue_says_when_to_come_again_and_time_runs_out(work: Path) -> None:
    asked = {"prompt": PROMPT, "model": DRIVEL, "max_new_tokens": 480}
    with (
        serving(
            work, "serve.adapters={drivel:drivel}", "serve.batch=1", "serve.queue=0", "serve.timeout_s=1"
        ) as server,
        ThreadPoolExecutor(1) as other,
    ):
        first = other.submit(server.ask, "/chat", asked | {"max_new_tokens": 480, "seed": 0})
        while server.metric("vllm:num_requests_running") != 1:
            assert not first.done()
            time.sleep(0.005)
        status, answer, headers = server.ask("/chat", asked)
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert headers["x-should-retry"] == "true"
        status, answer, _ = first.result()
        assert (status, answer["error"]["code"]) == (504, "timeout")
        assert server.ask("/chat", {"prompt": "x", "max_new_tokens": 1})[0] == 200, "it goes on"


@pytest.mark.exhaustive
def test_sigterm_lets_replies_come_to_their_end(work: Path) -> None:
    with serving(work, "serve.adapters={drivel:drivel}") as server, ThreadPoolExecutor(1) as other:
        asked = {"prompt": PROMPT, "model": DRIVEL, "max_new_tokens": 60, "seed": 0}
        reply = other.submit(server.ask, "/chat", asked)
        while server.metric("vllm:num_requests_running") != 1:
            time.sleep(0.005)
        server.running.send(signal.SIGTERM)
        status, answer, _ = reply.result()
        assert (status, answer["usage"]["completion_tokens"]) == (200, 60)
        ended = server.running.finish()
    assert ended.code == 0
    assert "serve: shutting down; replies that have begun are finished" in ended.err


@pytest.mark.exhaustive
def test_an_adapter_that_is_replaced_is_served_from_then_on(work: Path) -> None:
    shutil.copytree(work / "drivel", work / "changing")
    with serving(work, "serve.adapters={changing:changing}") as server:
        asked = {"prompt": PROMPT, "model": "base:changing", "temperature": 0, "max_new_tokens": 8}
        before = server.ask("/chat", asked)[1]
        shutil.copy(work / "babble/adapter_model.safetensors", work / "changing/adapter_model.safetensors")
        after = server.ask("/chat", asked)[1]
    assert before["content"] != after["content"]
    assert before["response"] != after["response"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("chat_template.json", '{"sha256": "0"}', "it was trained with another chat template"),
        ("chat_template.json", "[", "is damaged; export the adapter again"),
        ("adapter_config.json", None, "it was trained on the base other/model, and this server has embedded:language"),
        ("adapter_model.safetensors", "x", "is damaged"),
    ],
)
def test_an_adapter_of_another_base_or_template_is_refused(
    work: Path, server: Server, tmp_path: Path, file: str, text: str | None, words: str
) -> None:
    """By request: the others go on."""
    adapter = work / "second_try"
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(work / "drivel", adapter)
    if text is None:
        settings = json.loads((adapter / file).read_text())
        text = json.dumps(settings | {"base_model_name_or_path": "other/model"})
    (adapter / file).write_text(text)
    original = work / "babble"
    original.rename(tmp_path / "aside")
    adapter.rename(original)
    try:
        status, answer, _ = server.ask("/chat", {"prompt": "x", "model": "base:second"})
    finally:
        shutil.rmtree(original)
        (tmp_path / "aside").rename(original)
    assert (status, answer["error"]["code"]) == (409, "adapter_unusable")
    assert words in answer["error"]["message"]
    assert server.ask("/chat", {"prompt": "x", "model": "base:second"})[0] == 200
