"""Pipes, sockets and devices where a file belongs: opening a pipe that nobody writes into would wait for ever."""

import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tiny_language_models import save_language

Cli = Callable[..., Any]
WHY = "it is a pipe, socket or device, and no file"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)  # in the current folder: a whole path may be too long
    if path.parent != Path():
        shutil.move(path.name, path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.fixture
def here(workdir: Path) -> Path:
    """Two images, one with a caption."""
    Path("images").mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (64, 64)).save(f"images/{name}.png")
    Path("images/one.txt").write_text("a wall")
    Path("talk.jsonl").write_text('{"prompt": "Who?", "completion": "Me."}\n' * 4)
    return workdir


@pytest.mark.sampled
@pytest.mark.parametrize("make", [pipe, bound, device])
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("images/three.png", "caption conf=smoke data.folder=images"),
        ("images/two.txt", "caption conf=smoke data.folder=images"),
        ("images/metadata.jsonl", "caption conf=smoke data.folder=images"),
        ("chats.jsonl", "dataset conf=pirate_chat data.file=chats.jsonl"),
        ("chats", "dataset conf=pirate_chat data.file=chats"),
        ("more/a.parquet", "dataset conf=pirate_chat data.file=more"),
        ("chat.jinja", "dataset conf=pirate_chat data.file=talk.jsonl data.chat_template=chat.jinja"),
        ("lora.safetensors", "sample conf=smoke sample.adapter=lora.safetensors"),
        ("conf/odd.yaml", "train conf=odd"),
    ],
)
def test_no_command_waits_for_what_is_no_file(
    finetune_cli: Cli, here: Path, make: Callable[[Path], None], file: str, words: str
) -> None:
    path = Path(file)
    path.parent.mkdir(exist_ok=True)
    make(path)
    answer = ended(finetune_cli, words)
    assert answer.code in (2, 3, 4)
    [said] = [line for line in answer.err.splitlines() if line.startswith(("error: ", "  images"))][-1:]
    assert path.stem in said
    assert WHY in said


def test_a_link_to_nowhere_is_named_and_may_be_skipped(finetune_cli: Cli, here: Path) -> None:
    Path("images/three.png").symlink_to("gone.png")
    words = "caption conf=smoke data.folder=images"
    answer = ended(finetune_cli, words)
    assert answer.code == 3
    assert "images/three.png: can't be read (No such file or directory)" in answer.err
    answer = ended(finetune_cli, f"{words} data.skip_bad=true")
    assert answer.code == 0
    assert "left out images/three.png" in answer.err
    shutil.rmtree("images")
    Path("images").mkdir()
    Path("images/three.png").symlink_to("gone.png")
    assert "images has no images; images/three.png: can't be read" in ended(finetune_cli, words).err


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("file", "words", "said"),
    [
        ("a.gguf", "train conf=pixar_style model=sd15 model.base=a.gguf", "quantised for inference (GGUF)"),
        ("a.GGUF", "train conf=pirate_chat model.base=a.GGUF", "quantised for inference (GGUF)"),
        ("a/a.gguf", "train conf=pirate_chat model.base=a", "quantised for inference (GGUF)"),
        ("a/a.gguf", "plan conf=pirate_chat model.base=a", "quantised for inference (GGUF)"),
        ("a.gguf", "sample conf=smoke sample.adapter=a.gguf", "adapters are read from .safetensors files"),
        ("lora.pt", "train conf=smoke lora.start_from=lora.pt", "adapters are read from .safetensors files"),
    ],
)
def test_a_model_in_another_format_is_named(finetune_cli: Cli, here: Path, file: str, words: str, said: str) -> None:
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    data = "data.file=talk.jsonl" if "pirate" in words else "data.folder=images"
    answer = ended(finetune_cli, f"{words} run_dir=run {data}")
    assert answer.code == 4
    assert said in answer.err.splitlines()[-1]


@pytest.mark.exhaustive
def test_files_of_a_run_folder_may_be_pipes(finetune_cli: Cli, here: Path, tmp_path: Path) -> None:
    """They are named, or done without."""
    words = (
        f"train conf=pirate_chat model.base={save_language(tmp_path / 'lm')} run_dir=run data.cache=cache "
        "data.file=talk.jsonl data.workers=1 data.length=128 trainer.steps=1 trainer.save_every=1 lora.rank=2 "
        "trainer.validate_every=1 optim.warmup_steps=0 sample.prompts=[] hardware.device=cpu"
    )
    assert ended(finetune_cli, words).code == 0
    files = [path for path in Path("run").rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) > 10
    for file in files:
        kept = file.read_bytes()
        file.unlink()
        pipe(file)
        answer = ended(finetune_cli, words)
        assert "unexpected" not in answer.err, (file, answer.err)
        if file.is_fifo():
            file.unlink()
            file.write_bytes(kept)


def ended(finetune_cli: Cli, words: str) -> Any:
    """How the command ended. One that waits is given up after a while: a thread, because it can't be ended."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(finetune_cli(*words.split())), daemon=True)
    thread.start()
    thread.join(60)
    assert found, f"`{words}` still waits"
    return found[0]
