"""Adapters beside one another on one base, of any kind of model."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters import attach


class Attachments:
    """What is attached to a base now, by key. The base itself stays the module that is called."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self._attached: Any = base  # with the first adapter a `PeftModel` of it

    def load(self, folder: Path, key: str, then: Callable[[], None] = lambda: None) -> None:
        """Attach the adapter of a PEFT folder. Raises ModelError if it doesn't fit; the others are as they were.

        then: what must succeed too.
        """
        try:
            with warnings.catch_warnings(action="ignore"):  # of a second adapter
                self._attached = attach.attach_peft_folder(self._attached, folder, key)
            then()
        except BaseException:
            self.drop(key)
            raise

    def drop(self, key: str) -> None:
        """Take an adapter off, or what there is of it."""
        from peft.tuners.tuners_utils import delete_adapter

        with warnings.catch_warnings(action="ignore"):  # of another active adapter: every use names its own
            delete_adapter(self.base, key, prefix="lora_")
        known = getattr(self._attached, "peft_config", {})
        known.pop(key, None)
        if not known:
            self._attached = self.base
        else:  # PEFT reads the settings of an active one when the next is loaded
            self._attached.base_model.active_adapter = next(iter(known))
