"""How often one `train` opens a person's texts: the stages do not read the same file again and again."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.run import hashing
from tests.tiny_language_models import save_language

Cli = Callable[..., Any]
_counting: list[list[str]] = []


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _counting and isinstance(arguments[0], str | Path) and "w" not in str(arguments[1]):
        _counting[-1].append(Path(arguments[0]).name)


@pytest.fixture(scope="module", autouse=True)
def _hook() -> None:
    sys.addaudithook(_heard)  # for good: Python takes none away


@contextmanager
def opened() -> Iterator[list[str]]:
    """Names of the files that are opened for reading inside."""
    _counting.append([])
    try:
        yield _counting[-1]
    finally:
        _counting.pop()


@pytest.fixture(autouse=True)
def _as_if_files_were_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "RACY_NS", -(10**12))


def test_captions_are_read_once(finetune_cli: Cli, images: Path, small: list[str]) -> None:
    for text in sorted(images.glob("*.txt"))[1:]:
        with open(images / "metadata.jsonl", "a") as file:
            file.write(json.dumps({"file_name": f"{text.stem}.png", "text": text.read_text()}) + "\n")
        text.unlink()
    with opened() as files:
        answer = finetune_cli("train", *small, "run_dir=run")
    assert answer.code == 0, answer.err
    assert files.count("metadata.jsonl") == 2, "for its hash, and for its rows"
    with opened() as files:
        assert "caption: up to date" in finetune_cli("train", *small, "run_dir=run").err
    assert files.count("metadata.jsonl") == 0


def test_conversations_are_hashed_once_looked_at_once_and_read_once(finetune_cli: Cli, workdir: Path) -> None:
    save_language(workdir / "base")
    rows = [{"prompt": f"Who is {number}?", "completion": "Me."} for number in range(24)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        *("model.base=base", "data.file=chats.jsonl", "data.cache=cache", "data.length=192", "data.workers=1"),
        *("run_dir=run", "hardware.device=cpu", "lora.rank=4", "optim.warmup_steps=0", "trainer.steps=1"),
        *("trainer.micro_batch=2", "trainer.accumulate=1", "sample.prompts=[]", "export.formats=[peft]"),
    ]
    with opened() as files:
        answer = finetune_cli("train", "conf=pirate_chat", *settings)
    assert answer.code == 0, answer.err
    assert files.count("chats.jsonl") == 3
