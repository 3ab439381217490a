"""`finetune serve` with an image model, as its clients see it: over HTTP, in a process of its own."""

import base64
import io
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Browser, expect

from finetune.run.receipts import load_record
from finetune.run.records import Samples
from tests.end_to_end.conftest import settings
from tests.end_to_end.serving import Server, complaints, other_adapter, serving
from tests.tiny_families import save_family

PATH = "/v1/images/generations"
PROMPT = "a red wall, pixar style"


@pytest.fixture(scope="module")
def work(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "work"
    shutil.copytree(finished, folder)
    other_adapter(folder / "run", folder / "loud", 1)
    return folder


@pytest.fixture(scope="module")
def server(work: Path, tiny_base: Path, shared_cache: Path) -> Iterator[Server]:
    with serving(
        work,
        *settings(tiny_base, shared_cache)[1:],
        "serve.queue=4",
        "serve.adapters={loud:loud}",
        recipe="pixar_style",
    ) as found:
        yield found


def image(data: dict[str, Any]) -> Any:
    found = Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))
    found.load()
    return found


def draw(server: Server, **body: Any) -> Any:
    status, answer, _ = server.ask(PATH, {"prompt": PROMPT, "seed": 0} | body)
    assert status == 200, answer
    return image(answer["data"][0])


def same(one: Any, other: Any) -> bool:
    """But for rounding, which a batch of another size changes."""
    return one.size == other.size and max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1


def test_draws_what_the_run_has_sampled_base_and_tuned(server: Server, work: Path) -> None:
    samples = load_record(work / "run", "sample", Samples)
    assert samples
    item, folder = samples.items[0], work / samples.folder
    assert same(draw(server, model="base:pixar_style"), Image.open(folder / item.file))
    assert same(draw(server, model="base"), Image.open(folder / item.base_file))
    assert same(draw(server, model="base:pixar_style@step-2"), draw(server)), "the last step is what was exported"


def test_adapters_are_switched_between_jobs(server: Server) -> None:
    models = ["base", "base:loud", "base:pixar_style"]
    alone = {model: draw(server, model=model) for model in models}
    assert not same(alone["base"], alone["base:loud"])
    with ThreadPoolExecutor(3) as clients:
        asked = [models[index % 3] for index in range(12)]
        drawn = list(clients.map(lambda model: draw(server, model=model), asked))
    assert all(same(image, alone[model]) for model, image in zip(asked, drawn, strict=True))


def test_the_official_client_draws_and_the_file_says_how(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert "base:pixar_style@step-1" in [model.id for model in client.models.list()]
        found = client.images.generate(
            model="base", prompt=PROMPT, n=2, size="auto", extra_body={"seed": 7, "steps": 2}
        )
        assert found.data
        drawn = [image({"b64_json": each.b64_json}) for each in found.data]
        assert [each.size for each in drawn] == [(32, 32)] * 2
        assert [each.text["seed"] for each in drawn] == ["7", "8"]
        assert drawn[0].text | {"content": ""} == {
            "prompt": PROMPT,
            "negative_prompt": "",
            "seed": "7",
            "steps": "2",
            "guidance": "1.0",
            "model": "base",
            "content": "",
        }
        assert same(drawn[1], draw(server, model="base", seed=8, steps=2)), "alone as with others"
        with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3'"):
            client.images.generate(model="dall-e-3", prompt=PROMPT)


def test_progress_comes_step_by_step(server: Server) -> None:
    body = {"prompt": PROMPT, "seed": 0, "steps": 3, "stream": True, "size": "16x48", "min_p": 1}
    status, text, headers = server.ask(PATH, body)
    assert status == 200
    assert headers["x-finetune-warning"] == "ignored: min_p"
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert [event.get("step") for event in events] == [1, 2, 3, None]
    assert image(events[-1]).size == (16, 48)
    assert events[-1] | {"b64_json": "", "content": "", "created_at": 0} == {
        "type": "image_generation.completed",
        "created_at": 0,
        "prompt": PROMPT,
        "negative_prompt": "",
        "seed": 0,
        "steps": "3",
        "guidance": "1.0",
        "size": "16x48",
        "model": "base:pixar_style",
        "content": "",
        "b64_json": "",
    }


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "x" * 5000}, "prompt", "at most 4000 characters"),
        ({"size": "33x32"}, "size", "in multiples of 16 pixels, of 4,096 pixels at most, such as 32x32"),
        ({"size": "1024x1024"}, "size", "of 4,096 pixels at most"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"n": 17}, "n", "n is at most 16 here (serve.batch)"),
        ({"steps": 100_000}, "steps", "less than or equal to 200"),
        ({"guidance": -1}, "guidance", "greater than or equal to 0"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"response_format": "url"}, "response_format", "'b64_json'"),
    ],
)
def test_what_can_not_be_drawn_is_refused(server: Server, body: dict[str, Any], param: str, words: str) -> None:
    status, answer, _ = server.ask(PATH, {"prompt": PROMPT} | body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]


def test_a_long_prompt_is_cut_and_says_so(server: Server) -> None:
    status, _, headers = server.ask(PATH, {"prompt": "wall " * 100 + "end", "steps": 1})
    assert status == 200
    assert headers["x-finetune-warning"].startswith("the end of the prompt is too much for this model: ")
    assert headers["x-finetune-warning"].endswith("end")
    _, text, _ = server.ask(PATH, {"prompt": "wall " * 100 + "end", "steps": 1, "stream": True})
    assert json.loads(text.split("\n\n")[-3].removeprefix("data: "))["warning"] == headers["x-finetune-warning"]


def test_a_negative_prompt_without_guidance_is_named(server: Server) -> None:
    body = {"prompt": PROMPT, "steps": 1, "negative_prompt": "blue"}
    for guidance, said in ((1, "negative_prompt is not looked at without guidance above 1"), (2, None)):
        _, _, headers = server.ask(PATH, body | {"guidance": guidance})
        assert headers.get("x-finetune-warning") == said


@pytest.mark.exhaustive
def test_a_base_without_negative_prompts_says_so(tmp_path: Path) -> None:
    model = save_family(tmp_path / "base", "flux")
    words = [f"model.{key}={value}" for key, value in vars(model).items() if key in ("base", "family", "resolution")]
    with serving(tmp_path, *words, "hardware.device=cpu", "run_dir=run", recipe="pixar_style") as flux:
        _, _, headers = flux.ask(PATH, {"prompt": PROMPT, "steps": 1, "guidance": 3, "negative_prompt": "blue"})
    assert headers["x-finetune-warning"] == "this base takes no negative_prompt"


def test_the_images_page_begins_with_the_recipes_settings(server: Server) -> None:
    assert '<script type="module" src="static/images.js">' in server.ask("/")[1]
    assert server.ask("/api/image_settings")[1] == {
        "prompt": PROMPT,
        "negative_prompt": "",
        "steps": 1,
        "guidance": 1.0,
        "size": "32x32",
    }


def test_the_run_is_shown_with_what_it_left(server: Server) -> None:
    (run,) = server.ask("/api/runs")[1]["runs"]
    assert (run["name"], run["state"], run["step"], run["steps"]) == ("run", "finished", 2, 2)
    curves = server.ask("/api/runs/run/curves")[1]
    assert [step for step, _ in curves["curves"]["loss/smoothed"]] == [1, 2]
    (pair,) = server.ask("/api/runs/run/samples")[1]["items"]
    assert all(pair[side].startswith("data:image/png;base64,") for side in ("base", "tuned"))
    assert server.ask("/api/runs/run/previews")[1] == {"items": []}
    captions = server.ask("/api/runs/run/captions?first=1")[1]
    assert captions["total"] == 4
    assert len(captions["items"]) == 3
    assert all(each["image"].startswith("data:image/") for each in captions["items"])
    status, answer, _ = server.ask("/api/runs/loud/curves")
    assert (status, answer["error"]["code"]) == (404, "run_not_found")
    assert server.ask("/api/runs/run/captions?first=-1")[0] == 400


def test_a_person_draws_and_looks_at_the_run(server: Server, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 380, "height": 800})
    wrong = complaints(page)
    page.goto(server.url)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="Draw", exact=True).click()
    slider = page.get_by_role("slider", name="Base to the left")
    expect(slider).to_be_visible()
    slider.press("ArrowRight")
    expect(slider).to_have_value("51")
    shown = page.locator("#gallery img")
    expect(shown).to_have_count(2)

    page.get_by_label("Steps", exact=True).fill("200")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("step")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("status")).to_have_text("Cancelled.")
    page.reload()
    expect(shown).to_have_count(2)
    shown.first.click()
    page.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("7")

    page.get_by_role("link", name="Runs").click()
    page.get_by_role("link", name="run finished").click()
    expect(page.get_by_role("img", name="Training loss")).to_be_visible()
    expect(page.locator("#captions img")).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth") == 380, "nothing is wider than a phone"
    assert wrong == []


def test_a_chat_is_not_what_this_server_has(server: Server) -> None:
    assert server.ask("/chat", {"prompt": "x"})[0] == 404


def test_jobs_wait_in_a_queue_with_an_end_and_stop_when_nobody_waits(server: Server) -> None:
    long = {"prompt": PROMPT, "steps": 200, "n": 8}
    before = server.metric('vllm:request_success_total{finished_reason="stop"}')
    with ThreadPoolExecutor(6) as clients:
        jobs = [clients.submit(server.ask, PATH, long)]
        while not server.metric("vllm:num_requests_running"):
            time.sleep(0.005)
        jobs += [clients.submit(server.ask, PATH, {"prompt": PROMPT}) for _ in range(4)]
        while server.metric("vllm:num_requests_waiting") < 4:
            assert not any(job.done() for job in jobs)
            time.sleep(0.005)
        status, answer, headers = server.ask(PATH, {"prompt": PROMPT})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert {job.result()[0] for job in jobs} == {200}
    connection = server.connect(PATH, long)
    while not server.metric("vllm:num_requests_running"):
        time.sleep(0.005)
    connection.close()
    while server.metric("vllm:num_requests_running"):
        time.sleep(0.005)
    after = server.metric('vllm:request_success_total{finished_reason="stop"}')
    assert after == before + 5, "what nobody waits for is not finished"
