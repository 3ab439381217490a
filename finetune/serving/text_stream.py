"""From tokens that come one by one to text that never has to be taken back."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "�"  # what half a character is decoded to


class TextStream:
    """The text of one reply.

    A character of several tokens waits for the last of them, and what may be the beginning of a stop text waits until
    it is known whether it is. White space in front of the reply is left out.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.stopped = False
        self._ids: list[int] = []
        self._shown, self._read = 0, 0  # tokens: whose text was given, and from which on text is compared
        self._waiting = ""
        self._begun = False

    def push(self, token: int) -> str:
        """What can be said for sure after one more token. `stopped` is set where a stop text came up."""
        self._ids.append(token)
        # A token's text may depend on the one before it (a space in front): both decoded, and the first taken off.
        before, now = self._decode(self._read, self._shown), self._decode(self._read, len(self._ids))
        if now.endswith(UNFINISHED):
            return ""
        self._read, self._shown = self._shown, len(self._ids)
        return self._released(now[len(before) :])

    def end(self) -> str:
        """What has waited until now."""
        before, now = self._decode(self._read, self._shown), self._decode(self._read, len(self._ids))
        text = self._released(now[len(before) :])
        waiting, self._waiting = self._waiting, ""
        return "" if self.stopped else text + waiting

    def _decode(self, first: int, last: int) -> str:
        return str(
            self.tokenizer.decode(self._ids[first:last], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _released(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        text = self._waiting + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._waiting = True, ""
            return text[: min(found)]
        held = max((self._overlap(text, stop) for stop in self.stops), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Characters at the end of a text that begin the stop text."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
