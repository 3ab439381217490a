"""One conversation with a model and its adapter, from Python."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from finetune.adapters import lora
from finetune.config.schema import ModelConfig, SampleConfig
from finetune.data.text.formats import Message
from finetune.data.text.tokens import Chat
from finetune.language import causal_lm, export
from finetune.language.generate import TextGenerator


class Conversation:
    """Call it with what you say; it returns the reply, and remembers both."""

    def __init__(
        self,
        model: ModelConfig,
        settings: SampleConfig,
        chat: Chat,
        adapter: Path,
        device: torch.device,
        dtype: torch.dtype,
        vram_gib: float,
    ) -> None:
        """Raises ModelError for a base that can't be loaded, and an adapter that doesn't fit."""
        self.settings, self.chat = settings, chat
        self.turns: list[Message] = []
        self._generator = TextGenerator(chat.tokenizer, chat.stop_ids(), device, dtype)
        self._model = export.load(causal_lm.load_model(model, dtype, device, vram_gib=vram_gib), adapter)

    def __call__(self, prompt: str, *, seed: int = 0, tuned: bool = True) -> str:
        """The reply. tuned: False asks the base. Raises DataError for a text that the template refuses, ModelError
        where the conversation leaves no room for a reply."""
        turns = [*self.turns, Message("user", prompt)]
        reply = self._reply(turns, seed, tuned=tuned)
        self.turns = [*turns, Message("assistant", reply)]
        return reply

    def forget(self) -> None:
        """Begin again."""
        self.turns = []

    def _reply(self, turns: Sequence[Message], seed: int, *, tuned: bool) -> str:
        ids = self.chat.answer_ids(turns, "the conversation")
        with nullcontext() if tuned else lora.disabled(self._model):
            (reply,) = self._generator.generate(
                self._model,
                [(ids, seed)],
                max_new_tokens=self.settings.max_new_tokens,
                temperature=self.settings.temperature,
            )
        return reply
