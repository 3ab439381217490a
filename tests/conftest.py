"""What every test may count on: no network, no GPU unless marked, a clean terminal."""

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import pytest

# Before any library reads it: a test that needs a download fails at once instead of waiting for a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script's `pytest &` has it, and every process started here
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
TERMINAL = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
NO_WISHES = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")  # rich reads them


@pytest.fixture(scope="session", autouse=True)
def _same_terminal_for_everyone() -> Iterator[None]:
    """What is printed does not depend on where the tests are run from. pytest itself keeps the real terminal."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TERMINAL.items():
            patch.setenv(name, value)
        for name in NO_WISHES:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def _libraries_set_aside() -> None:
    """Keeps what stays anyway out of the search for cycles.

    Half a million objects of the libraries: a third of a second, each time that a stage makes room.
    """
    if "torch" in sys.modules:
        import peft  # noqa: F401  the last to be imported, and with all the others behind it
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Answer:
    """What a command line printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def example_data(workdir: Path) -> Path:
    """Where the example recipes look for their data, files that no stage could read. Returns the current folder."""
    for file in ("datasets/pixar_style/1.png", "datasets/pirate_chat/conversations.jsonl"):
        (workdir / file).parent.mkdir(parents=True)
        (workdir / file).touch()
    return workdir


@pytest.fixture
def finetune_cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Runs a command line in this process and leaves the process as it was."""
    from finetune import cli

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(cli.logging, "basicConfig", lambda **_: None)  # pytest holds the root logger

    def run(*words: str) -> Answer:
        capfd.readouterr()
        code = cli.main(words)
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="K/N", default="0/1", help="the K-th of N shares of the tests, from 0 on")


@pytest.hookimpl(tryfirst=True)  # before `-m` picks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _sample(items)
    share, shares = map(int, config.getoption("--share").split("/"))
    if shares > 1:
        items[:] = [item for item in items if crc32(item.nodeid.encode()) % shares == share % shares]
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def _sample(items: list[pytest.Item]) -> None:
    """Of each test marked `sampled` one case stays; of tests for both kinds of model some get one, some the other."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("exhaustive"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, found in cases.items():
        chosen = crc32(name.encode()) % len(found)
        for item in found[:chosen] + found[chosen + 1 :]:
            item.add_marker(pytest.mark.exhaustive)
