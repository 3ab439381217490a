"""`finetune.serve`, `finetune.chat` and `finetune.draw`: what was trained, used from Python."""

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

import finetune
from finetune.config.schema import Config
from finetune.errors import ConfigError, DataError, ModelError
from finetune.run.receipts import load_record
from finetune.run.records import Samples
from tests.conftest import ROOT
from tests.end_to_end.conftest import settings
from tests.end_to_end.serving import other_adapter, train

DOCS = ROOT / "docs/serving.md"
PROMPT = "How much is 2 plus 3?"


@pytest.fixture(scope="module")
def pirate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    folder = tmp_path_factory.mktemp("python")
    drivel = other_adapter(train(folder), folder / "drivel", 1)
    with chdir(folder):
        yield finetune.load("pirate_chat", ["hardware.device=cpu", f"sample.adapter={drivel}", "serve.port=0"])


def ask(url: str, body: Any) -> Any:
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)


def test_a_server_runs_as_long_as_its_block(pirate: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with finetune.serve(pirate) as server:
        assert server.models[:2] == ("base:pirate_chat", "base")
        assert server.keys == {}
        body = {"prompt": PROMPT, "model": "base", "temperature": 0}
        assert ask(f"{server.url}/chat", body)["response"] == "2 plus 3 is 5."
    assert f"curl {server.url}/chat" in capsys.readouterr().err
    with pytest.raises(OSError, match="refused"):
        ask(f"{server.url}/chat", body)


def example(of: str, **replaced: str) -> str:
    """The example of docs/serving.md in which a text stands, with other names in it."""
    (found,) = [text for text in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if of in text]
    for name, other in replaced.items():
        assert name in found
        found = found.replace(name, other)
    return found


def test_the_examples_of_the_docs_run(pirate: Config, capsys: pytest.CaptureFixture[str]) -> None:
    words: dict[str, Any] = {"config": pirate, "name": "base:pirate_chat"}
    exec(example("finetune.serve", **{'"pirate_chat", "serve.port=0"': "config"}), words)
    assert "('base:pirate_chat', 'base'" in capsys.readouterr().out
    with finetune.serve(pirate) as server:
        exec(example("from openai", **{"http://127.0.0.1:8000": server.url}), words)
    assert capsys.readouterr().out.strip()
    exec(example("finetune.chat", **{'"pirate_chat"': "config"}), words)
    assert capsys.readouterr().out.rstrip().endswith("8 plus 5 is 13.")


def test_a_server_that_can_not_begin_raises(pirate: Config) -> None:
    weights = Path(pirate.run_dir) / "adapter/peft/adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(b"x")
    try:
        with pytest.raises(ModelError, match="is damaged"), finetune.serve(pirate):
            pass
    finally:
        weights.write_bytes(content)


def test_a_conversation_goes_on(pirate: Config) -> None:
    talk = finetune.chat(pirate, ["sample.max_new_tokens=12"])
    assert talk(PROMPT, tuned=False) == "2 plus 3 is 5."
    said = talk("Hello", tuned=False)
    assert [turn.content for turn in talk.turns] == [PROMPT, "2 plus 3 is 5.", "Hello", said]
    with pytest.raises(DataError, match="the conversation"):
        talk("\ud83d")
    assert len(talk.turns) == 4
    talk.forget()
    assert talk(PROMPT) != "2 plus 3 is 5."
    assert talk.turns[0].content == PROMPT
    with pytest.raises(ModelError, match="are more than the 512 tokens that the base reads"):
        talk("word " * 600)


def test_images_are_those_that_the_run_has_drawn(
    finished: Path, tiny_base: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    config = finetune.load("pixar_style", settings(tiny_base, shared_cache)[1:])
    record = load_record(Path("run"), "sample", Samples)
    assert record
    item, draw = record.items[0], finetune.draw(config)
    for file, tuned in ((item.file, True), (item.base_file, False)):
        drawn, expected = draw(item.prompt, seed=item.seed, tuned=tuned), Image.open(Path(record.folder) / file)
        assert max(high for _, high in ImageChops.difference(drawn, expected).getextrema()) <= 1, "but for rounding"
    assert draw(item.prompt, steps=2, guidance=1.0).size == (32, 32)
    code = example("finetune.draw", **{'"pixar_style")': "config)", "robot.png": str(tmp_path / "robot.png")})
    exec(code, {"config": config})
    assert Image.open(tmp_path / "robot.png").size == (32, 32)


def test_what_can_not_be_used_is_said(pirate: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"is a recipe for a language model; type finetune\.chat\(…\)"):
        finetune.draw(pirate)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="has no adapter"):
        finetune.chat("pirate_chat", ["hardware.device=cpu"])
