"""Tokens that the base has no row for are named before anything is trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import finetune
from finetune import kinds
from finetune.config.schema import Config
from finetune.errors import ModelError
from finetune.language import tokenize

CPU = torch.device("cpu")


@pytest.fixture
def base(language_config: Config, tmp_path: Path) -> Path:
    """A base whose tokenizer has two tokens more than its embedding has rows."""
    folder = Path(shutil.copytree(language_config.model.base, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|sea|>", "<|ship|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    language_config.model.base = str(folder)
    return folder


def say_ship(config: Config) -> None:
    file = Path(config.data.file)
    file.write_text(file.read_text().replace("matey", "matey<|ship|>"))


@pytest.mark.usefixtures("base")
def test_a_token_beyond_the_embedding_is_named_before_training(language_config: Config) -> None:
    say_ship(language_config)
    with pytest.raises(
        ModelError, match=r"conversations.jsonl.*'<\|ship\|>' the id \d+, .* has \d+ rows.*added_tokens="
    ):
        finetune.train(language_config)
    assert not (Path(language_config.run_dir) / "checkpoints").exists()


@pytest.mark.usefixtures("base")
def test_what_the_message_offers_trains_the_token(language_config: Config) -> None:
    say_ship(language_config)
    language_config.model.added_tokens = ["<|ship|>"]
    task = kinds.of(language_config).build_task(language_config, tokenize.build(language_config, None), CPU)
    task.loss(task.collate(next(iter(task.steps(effective=2, start=0))))).backward()  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("base")
def test_a_token_that_nobody_uses_stops_nothing_but_a_prompt_with_it(language_config: Config) -> None:
    task = kinds.of(language_config).build_task(language_config, tokenize.build(language_config, None), CPU)
    assert task.sample(["How many?"], 0)
    with pytest.raises(ModelError, match=r"sample.prompts: the tokenizer gives '<\|sea\|>'"):
        task.sample(["How many <|sea|>?"], 0)


def test_padding_out_of_range_is_named(language_config: Config, base: Path) -> None:
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"pad_token_id": 100_000}))
    with pytest.raises(ModelError, match=r"pad_token_id=100000, but a vocabulary of \d+ tokens"):
        finetune.train(language_config)
