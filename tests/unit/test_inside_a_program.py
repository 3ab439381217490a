"""Runs inside another program: what belongs to the process is afterwards as the program had it."""

import copy
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hydra import initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

import finetune
from finetune.config.schema import Config
from finetune.errors import ConfigError
from finetune.run.records import CaptionSet, Result


@pytest.fixture
def strange_host() -> Iterator[None]:
    """A program that has set everything in another way than torch's defaults."""
    store, threads = ConfigStore.instance(), torch.get_num_threads()
    before = dict(store.repo)
    store.store(name="config", node={"port": 1})
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)
    torch.manual_seed(5)
    try:
        with initialize(version_base="1.3", config_path=None), torch.no_grad():
            yield
    finally:
        store.repo = before
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def state() -> dict[str, Any]:
    """What a process has one of."""
    loggers = [logging.getLogger(name) for name in ("", "finetune", "transformers", "diffusers")]
    return {
        "environment": dict(os.environ),
        "random numbers": (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "arithmetic": (torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "attention": (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "warnings": (list(warnings.filters), warnings.formatwarning),
        "logging": [(log.level, list(log.handlers)) for log in loggers],
        "folder": Path.cwd(),
        "hydra": (id(GlobalHydra.instance().hydra), copy.deepcopy(ConfigStore.instance().repo)),
    }


def adapter(result: Result) -> bytes:
    return Path(result.adapter.folder, "peft", "adapter_model.safetensors").read_bytes()


def quick(config: Config, run_dir: str, **settings: Any) -> Config:
    """The tiny run on conversations without previews and samples."""
    config = copy.deepcopy(config)
    config.run_dir, config.trainer.steps, config.sample.prompts = run_dir, 2, []
    return replace(config, **settings)


def test_runs_leave_the_process_as_it_was_and_do_not_depend_on_it(
    language_config: Config, workdir: Path, request: pytest.FixtureRequest
) -> None:
    alone = finetune.train(quick(language_config, "alone"))  # imports what sets things at its import
    request.getfixturevalue("strange_host")
    before = state()
    other = finetune.train(quick(language_config, "other", seed=7), {"lora.rank": 2, "lora.dropout": 0.5})
    again = finetune.train(quick(language_config, "again"))
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(finetune.train(quick(language_config, "thread"))))
    thread.start()
    thread.join()
    after = state()
    assert [key for key, value in before.items() if after[key] != value] == []
    assert adapter(again) == adapter(alone) == adapter(found[0]) != adapter(other)


def test_a_run_that_fails_leaves_the_process_as_it_was(
    language_config: Config, workdir: Path, strange_host: None
) -> None:
    before = state()
    language_config.model.base = "nowhere/at/all/"
    with pytest.raises(finetune.errors.FinetuneError):
        finetune.train(language_config)
    after = state()
    assert [key for key, value in before.items() if after[key] != value] == []


def test_threads_take_turns(example_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.memory import device
    from finetune.stages import caption

    inside, most, said, another = [], [], [], threading.Event()

    def say(text: str) -> None:
        said.append(text)
        another.set()

    def work(config: Config) -> CaptionSet:
        inside.append(config.seed)
        most.append(len(inside))
        another.wait(timeout=60)
        inside.remove(config.seed)
        return CaptionSet("pics", ())

    monkeypatch.setattr(caption, "caption", work)
    monkeypatch.setattr(device, "say", say)
    threads = [
        threading.Thread(target=finetune.caption, args=("smoke", {"run_dir": f"run-{seed}", "seed": seed}))
        for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
    assert "waiting for another run in this process to end" in said


def test_recipes_are_composed_in_several_threads_at_once(workdir: Path) -> None:
    found: dict[int, Any] = {}

    def load(seed: int) -> None:
        try:
            found[seed] = finetune.load("smoke", {"seed": seed}).seed
        except ConfigError as error:
            found[seed] = error

    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: seed for seed in range(6)}


@pytest.fixture
def in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What a kernel would be sent to show."""
    import IPython

    shown: list[dict[str, str]] = []

    class Shell:
        kernel = "a kernel"

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(data)

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(data)
        return Handle()

    monkeypatch.setattr(IPython, "get_ipython", Shell)
    monkeypatch.setattr("IPython.display.display", display)
    return shown


@pytest.fixture
def chatty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caption stage does nothing but let libraries, and this one, print."""
    import transformers

    from finetune.stages import caption

    def chatter(config: Config, *_: Any) -> Any:
        warnings.warn_explicit("chatter", FutureWarning, "other.py", 1, module="transformers.models")
        logging.getLogger("elsewhere").warning("chatter")
        transformers.logging.get_logger("transformers.some").warning("chatter")
        warnings.warn_explicit("worth knowing", UserWarning, "ours.py", 1, module="finetune.data")
        return CaptionSet("pics", ())

    monkeypatch.setattr(caption, "caption", chatter)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own show everything


def test_at_pythons_prompt_libraries_are_quiet(
    chatty: None, example_data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with warnings.catch_warnings(record=True) as found:
        finetune.caption("smoke", {"run_dir": "run"})
    assert [str(warning.message) for warning in found] == ["worth knowing"]
    assert capfd.readouterr().err == ""


def test_in_a_notebook_libraries_are_quiet_and_there_is_a_bar(
    chatty: None,
    language_config: Config,
    example_data: Path,
    in_a_notebook: list[dict[str, str]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = state()
    with warnings.catch_warnings(record=True) as found:
        finetune.caption("smoke", {"run_dir": "run"})
    assert [str(warning.message) for warning in found] == ["worth knowing"]
    assert capfd.readouterr().err == ""
    after = state()
    assert [key for key, value in before.items() if after[key] != value] == []
    finetune.train(quick(language_config, "bar"))
    assert in_a_notebook[-1]["text/plain"].startswith("train: 2/2 steps, ")
    assert '<progress value="1.0000"' in in_a_notebook[-1]["text/html"]
    assert "train: 2/2" not in capfd.readouterr().err


def test_an_error_in_ipython_is_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell: Callable[..., Any] = InteractiveShell.instance
    try:
        shell().run_cell("import finetune; finetune.load('smoke', ['lora.rnak=3', 'seed=x'])")
    finally:
        InteractiveShell.clear_instance()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == [
        "ConfigError: no key called lora.rnak; did you mean lora.rank?",
        "ConfigError: seed must be a whole number, got 'x'",
    ]
