"""A run that is cut by a signal of its own."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finetune.training.loop import Step
from finetune.training.trainer import Trainer


@contextmanager
def cut(after: int, number: int = signal.SIGINT) -> Iterator[None]:
    """Inside, a run gets the signal once it has taken in so many steps."""
    note = Trainer.note

    def interrupt(session: Trainer, step: Step) -> None:
        note(session, step)
        if step.number == after:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "note", interrupt)
        yield
