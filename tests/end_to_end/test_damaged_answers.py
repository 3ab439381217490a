"""Damage in the samples/ of a run on conversations: `sample` and `train` make them again, `report` names what is
wrong."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.errors import RunError
from finetune.serving.runs import Runs
from tests.end_to_end.damage import assert_made_again, contents, cut, replaced
from tests.tiny_language_models import save_language

pytestmark = pytest.mark.sampled


Cli = Callable[..., Any]
PAGE, LIST = "answers.md", "samples.jsonl"
SETTINGS = [
    *("model.base=base", "data.file=chats.jsonl", "data.cache=cache", "data.length=192", "data.workers=1"),
    *("run_dir=run", "hardware.device=cpu", "lora.rank=4", "optim.warmup_steps=0", "trainer.steps=2"),
    *("trainer.micro_batch=2", "trainer.accumulate=1", "trainer.save_every=2", "trainer.validate_every=2"),
    *('sample.prompts=["Who are you?"]', "sample.max_new_tokens=4", "sample.previews=0", "export.formats=[peft]"),
]


@pytest.fixture(scope="module")
def finished_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a tiny language model was trained to its end."""
    work = tmp_path_factory.mktemp("finished-chat")
    save_language(work / "base")
    turns = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "Me."}]
    rows = [{"messages": [turns[0] | {"content": f"Who is {number}?"}, turns[1]]} for number in range(24)]
    (work / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.chdir(work):
        finetune.train("pirate_chat", SETTINGS)
    return work


@pytest.fixture
def answered(finished_chat: Path, workdir: Path) -> Path:
    """The run folder of that run, in the current folder."""
    shutil.copytree(finished_chat, workdir, dirs_exist_ok=True)
    return Path("run")


def _written(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def _changed(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (row,) = map(json.loads, (folder / LIST).read_text(encoding="utf-8").splitlines())
        (folder / LIST).write_text(json.dumps(row | values) + "\n", encoding="utf-8")

    return damage


PAGES: dict[str, Callable[[Path], Any]] = {
    "gone": lambda folder: (folder / PAGE).unlink(),
    "empty": _written(PAGE, b""),
    "no text": _written(PAGE, b"\xff\xfe\0"),
    "a folder": replaced(PAGE, Path.mkdir),
    "a pipe": replaced(PAGE, os.mkfifo),
    "a link to itself": replaced(PAGE, lambda file: file.symlink_to(file.name)),
}
LISTS: dict[str, Callable[[Path], Any]] = {
    "cut": cut(LIST),
    "no text": _written(LIST, b"\xff\xfe\0"),
    "a number": _written(LIST, b"7\n"),
    "of images": _written(LIST, b'{"prompt": "a", "seed": 0, "base": "b.png", "tuned": "t.png", "width": 8}\n[]\n'),
    "no answer": _changed(tuned=None),
    "a seed in words": _changed(seed="zero"),
    "a folder": replaced(LIST, Path.mkdir),
    "a pipe": replaced(LIST, os.mkfifo),
}
NOT_KEPT = ("gone", "a folder", "a pipe", "a link to itself")


@pytest.mark.parametrize("name", PAGES)
def test_a_damaged_page_of_answers_is_written_again(finetune_cli: Cli, answered: Path, name: str) -> None:
    whole = contents(answered / "samples")
    PAGES[name](answered / "samples")
    assert finetune_cli("report", f"run_dir={answered}").code == 0
    assert "Who are you?" in (answered / "report.html").read_text()
    (item,) = Runs(Path()).samples("run")["items"]
    assert item["prompt"] == "Who are you?"
    assert_made_again(finetune_cli, answered, whole, keeps=name not in NOT_KEPT)


@pytest.mark.parametrize("name", LISTS)
def test_a_damaged_list_of_answers_is_named_and_made_again(finetune_cli: Cli, answered: Path, name: str) -> None:
    whole = contents(answered / "samples")
    LISTS[name](answered / "samples")
    refused = finetune_cli("report", f"run_dir={answered}")
    assert refused.code == RunError.exit_code, refused.err
    (line,) = [line for line in refused.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {answered / 'samples' / LIST} is damaged (")
    Runs(Path()).samples("run")
    assert_made_again(finetune_cli, answered, whole, keeps=name not in NOT_KEPT)


def test_the_command_that_trained_answers_again_too(finetune_cli: Cli, answered: Path) -> None:
    whole = contents(answered / "samples")
    (answered / "samples" / PAGE).write_bytes(b"")
    (answered / "samples" / LIST).unlink()
    assert finetune_cli("train", "conf=pirate_chat", *SETTINGS).code == 0
    assert contents(answered / "samples") == whole
