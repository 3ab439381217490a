"""Answers on disk: the base's and the tuned model's, from the same prompt and random numbers."""

import json
from html import unescape
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

from finetune import kinds
from finetune.adapters import formats, lora
from finetune.config.schema import Config
from finetune.errors import ModelError
from finetune.language import causal_lm, sample
from finetune.language.generate import TextGenerator
from finetune.language.task import inject
from finetune.language.tokenize import chat_of
from finetune.run.records import Answer

ODD = "| a | b |\n# no heading\n**5** * 3 < `x`\\| [1](2) <b> &amp; $y$ ~~z~~ _u_\n\n- no list\r\n```\nfenced"


@pytest.fixture
def adapter(language_config: Config, tmp_path: Path) -> Path:
    """A PEFT folder whose update is large enough to change every answer."""
    cpu = torch.device("cpu")
    base = causal_lm.load_model(language_config.model, torch.float32, cpu)
    model = inject(base, language_config.model, language_config.lora, 0, [])
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(value.shape, generator=random) for name, value in lora.state(model).items()}
    formats.save_peft(model, tmp_path / "peft", weights, language_config.model.base)
    return tmp_path / "peft"


def drawn(config: Config, adapter: Path, folder: Path) -> tuple[Answer, ...]:
    folder.mkdir()
    page, items = kinds.of(config).sample(config, adapter, folder)
    assert page == "answers.md"
    return items  # type: ignore[return-value]


def test_every_prompt_is_answered_by_both(language_config: Config, adapter: Path, tmp_path: Path) -> None:
    config = language_config
    config.sample.prompts, config.sample.seeds = ["How many cats?", "hi!"], [0, 3]
    config.sample.temperature, config.sample.max_new_tokens = 0.3, 8
    items = drawn(config, adapter, tmp_path / "samples")
    assert [(item.prompt, item.seed) for item in items] == [
        (prompt, seed) for prompt in config.sample.prompts for seed in (0, 3)
    ]
    assert all(item.base != item.tuned for item in items)
    assert items[0].base != items[1].base
    chat = chat_of(config.model, config.data)
    generator = TextGenerator(chat.tokenizer, chat.stop_ids(), torch.device("cpu"), torch.float32)
    base = causal_lm.load_model(config.model, torch.float32, torch.device("cpu"))
    alone = generator.generate(base, [(chat.prompt_ids("hi!"), 3)], max_new_tokens=8, temperature=0.3)
    assert alone == [items[3].base]


def test_what_is_written_says_how_it_was_made(language_config: Config, adapter: Path, tmp_path: Path) -> None:
    language_config.sample.prompts = ["How many cats?", "Wie heißt du? 🦜"]
    items = drawn(language_config, adapter, tmp_path / "samples")
    lines = (tmp_path / "samples" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "prompt": item.prompt,
            "seed": 0,
            "base": item.base,
            "tuned": item.tuned,
            "max_new_tokens": 4,
            "temperature": 0.0,
            "model": language_config.model.base,
            "adapter": str(adapter),
        }
        for item in items
    ]
    page = (tmp_path / "samples" / "answers.md").read_text(encoding="utf-8")
    assert page == sample.page(items)
    assert "## Wie heißt du? 🦜" in page


def test_without_a_temperature_one_seed_is_enough(language_config: Config, adapter: Path, tmp_path: Path) -> None:
    language_config.sample.seeds = [5, 6]
    assert [item.seed for item in drawn(language_config, adapter, tmp_path / "samples")] == [5]


def test_an_adapter_that_is_not_there_is_named(language_config: Config, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter at .*nowhere"):
        drawn(language_config, tmp_path / "nowhere", tmp_path / "samples")


def test_the_page_shows_the_answers_to_the_letter() -> None:
    items = [Answer(f"Why?\n{ODD}", 0, "one\ntwo", ODD), Answer("next", 0, "", "|"), Answer("next", 1, "\\", "\\|")]
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(sample.page(items))
    assert html.count("<table>") == html.count("<h2>") == 2
    cells = [part.split("</td>")[0] for part in html.split("<td>")[1:]]
    shown = [unescape(cell.replace("<br>", "\n").replace("<br />", "\n")) for cell in cells]
    said = [ODD.replace("\r\n", "\n")]
    assert shown == ["0", "one\ntwo", *said, "0", "", "|", "1", "\\", "\\|"]
    heading = unescape(html.split("<h2>")[1].split("</h2>")[0])
    assert heading == " ".join(f"Why? {ODD}".split())
