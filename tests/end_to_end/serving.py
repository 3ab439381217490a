"""A server in a process of its own, on a run of two steps with the embedded language model."""

import contextlib
import json
import re
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from playwright.sync_api import Page
from safetensors.torch import load_file, save_file

import finetune
from tests.end_to_end import command

URL = re.compile(r"^serve: (http://\S+) \(stop", re.MULTILINE)
TWO_STEPS = [
    *(
        "hardware.device=cpu",
        "trainer.steps=2",
        "trainer.save_every=1",
        "trainer.validate_every=0",
        "trainer.patience=0",
    ),
    *("export.formats=[peft]", "export.checkpoint=last", "sample.prompts=[]", "data.file=chats.jsonl"),
]
TURNS = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Arr, a pirate."}]


def train(folder: Path, *overrides: str) -> Path:
    """A finished run of conf=pirate_chat in `folder`; returns the run folder."""
    lines = [
        json.dumps({"messages": [{**turn, "content": f"{turn['content']} {i}"} for turn in TURNS]}) for i in range(4)
    ]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    with contextlib.chdir(folder):
        finetune.train("pirate_chat", [*TWO_STEPS, *overrides])
    return folder / "outputs/pirate_chat"


def other_adapter(run: Path, folder: Path, seed: int, size: float = 0.3) -> Path:
    """An adapter of the same shape that says something else: its B is random."""
    shutil.copytree(run / "adapter/peft", folder)
    file = folder / "adapter_model.safetensors"
    random = torch.Generator().manual_seed(seed)
    weights = {
        name: size * torch.randn(weight.shape, generator=random) if ".lora_B." in name else weight
        for name, weight in sorted(load_file(file).items())
    }
    save_file(weights, file, metadata={"format": "pt"})
    return folder


class Client:
    """Somebody who asks the server at a URL, with a key if there is one."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url, self.key = url, key

    def request(self, path: str, body: Any = None, **headers: str) -> urllib.request.Request:
        """A GET, or a POST of a body as JSON; `_` in a header's name stands for `-`."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        found = urllib.request.Request(self.url + path, data)
        if data is not None:
            found.add_header("Content-Type", "application/json")
        if self.key:
            found.add_header("Authorization", f"Bearer {self.key}")
        for name, value in headers.items():
            found.add_header(name.replace("_", "-"), value)
        return found

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, body (of JSON, or text) and headers."""
        try:
            with urllib.request.urlopen(self.request(path, body, **headers), timeout=60) as answer:
                return (
                    answer.status,
                    _read(answer.read()),
                    {name.lower(): text for name, text in answer.headers.items()},
                )
        except urllib.error.HTTPError as error:
            return error.code, _read(error.read()), {name.lower(): text for name, text in error.headers.items()}

    def connect(self, path: str, body: Any) -> socket.socket:
        """A connection on which a request was sent; nobody has read the answer."""
        address, data = urlsplit(self.url), json.dumps(body).encode()
        connection = socket.create_connection((address.hostname, address.port))
        head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    def metric(self, name: str) -> float:
        """A number of `/metrics`."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", str(self.ask("/metrics")[1]), re.MULTILINE)
        assert found, name
        return float(found[1])


class Server(Client):
    """A running `finetune serve`."""

    def __init__(self, running: command.Running) -> None:
        self.running = running
        found: list[str] = []

        def is_up() -> bool:
            found[:] = URL.findall(running.err.read_text(encoding="utf-8"))
            return bool(found)

        running.wait_for("address", is_up)
        super().__init__(found[0])

    @property
    def said(self) -> str:
        """What it has printed."""
        return self.running.err.read_text(encoding="utf-8")


def _read(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.decode()


def complaints(page: Page) -> list[str]:
    """Errors of a page's scripts, and what its policy forbade, as they come."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("console", lambda line: found.append(line.text) if line.type == "error" else None)
    return found


@contextlib.contextmanager
def serving(folder: Path, *overrides: str, recipe: str = "pirate_chat") -> Iterator[Server]:
    """A server in `folder` until the block ends."""
    running = command.start(
        "serve", f"conf={recipe}", "hardware.device=cpu", "serve.port=0", *overrides, cwd=folder, OMP_NUM_THREADS="1"
    )
    try:
        yield Server(running)
    finally:
        running.process.kill()
        running.process.wait()
