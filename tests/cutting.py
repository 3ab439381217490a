"""A run that stops by a signal to itself."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finetune.training.loop import Step
from finetune.training.trainer import Trainer


@contextmanager
def cut(after: int, number: int = signal.SIGINT) -> Iterator[None]:
    """Inside, a run gets the signal after so many steps."""
    after_step = Trainer.after_step

    def interrupt(trainer: Trainer, step: Step) -> None:
        after_step(trainer, step)
        if step.number == after:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "after_step", interrupt)
        yield
