"""What other libraries print: nothing below an error, unless it is asked for."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetune.run.progress import in_notebook

VARIABLES = {  # what libraries read when they are imported
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "KINETO_LOG_LEVEL": "6",
}

in_command = False
"""Whether this process is a command line, and not a notebook or a program that imports finetune."""


def quieten() -> None:
    """No chatter for the rest of this process: warnings of this package alone, as plain lines."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"finetune(\..*)?")
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)


@contextmanager
def quiet_where_typed() -> Iterator[None]:
    """In a notebook and at Python's prompt, `quieten` while the block runs; an application keeps its own way."""
    if not in_notebook() and not hasattr(sys, "ps1"):
        yield
        return
    shown, before = warnings.formatwarning, {name: os.environ.get(name) for name in VARIABLES}
    levels = {log: log.level for log in (logging.getLogger(), logging.getLogger("finetune"))}
    with warnings.catch_warnings(), without_warnings():
        quieten()
        for log, level in zip(levels, (logging.ERROR, logging.INFO), strict=True):
            log.setLevel(level)
        try:
            yield
        finally:
            warnings.formatwarning = shown
            for log, level in levels.items():
                log.setLevel(level)
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """No progress bars of diffusers and transformers: they count tensors, not seconds."""
    shown = [log for log in _logs() if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Diffusers and transformers say nothing below an error."""
    before = [(log, log.get_verbosity()) for log in _logs()]
    for log, _ in before:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in before:
            log.set_verbosity(level)


def _logs() -> list[Any]:
    """Of libraries that are there already: importing diffusers to silence it would cost two seconds."""
    found = [sys.modules.get(f"{library}.utils.logging") for library in ("diffusers", "transformers")]
    return [log for log in found if log is not None]
