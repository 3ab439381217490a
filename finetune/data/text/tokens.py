"""From a conversation to token ids and the mask of trained tokens, by the tokenizer's own chat template.

Trained are the assistant's turns, each with the token that ends it, and nothing else; of plain text, all of it. A
conversation is rendered and tokenised once and whole, so its ids are those of `apply_chat_template`.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.text import vocabulary
from finetune.data.text.formats import TEXT, Conversation, Message
from finetune.data.text.template import SKIP, Rendered, Template
from finetune.errors import DataError

# T tokens of a row


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row. ids (T,) uint32; trained (T,) bool: whether the token is a target, predicted from those before it.

    The first token has none before it and is never trained. shortened: answers of which the template leaves out a part
    (earlier thinking). control: control tokens that are spelled in the messages' own texts.
    """

    ids: NDArray[np.uint32]
    trained: NDArray[np.bool_]
    shortened: int = 0
    control: int = 0


class Chat:
    """A tokenizer with a chat template; pickles, so that several processes may encode.

    template: empty for the tokenizer's own, the name of a built-in one (chatml), or the text of one. A tokenizer
    without one still takes plain text.
    """

    def __init__(self, tokenizer: Any, *, template: str = "") -> None:
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, template)
        control = map(re.escape, vocabulary.control_tokens(tokenizer))
        self._control = re.compile("|".join(control) or r"(?!)")

    @property
    def content_hash(self) -> str:
        """Hash (hex) of everything that decides ids and masks."""
        return vocabulary.content_hash(self.tokenizer, self.template.text)

    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer: what a sampler must stop at. Raises DataError where there are none."""
        turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
        spelled = self.template.closings(turns, "the chat template") if self.template.text else ()
        last = [self.template.last_token(closing) for closing in spelled if self.template.is_token(closing)]
        found = [self.tokenizer.convert_tokens_to_ids(token) for token in last]
        own = self.tokenizer.eos_token_id
        if not found and own is None:
            raise _endless("the chat template")
        return tuple(dict.fromkeys([*found, *([own] if own is not None else [])]))

    def encode(self, row: Conversation) -> Encoded:
        """One row as tokens. Raises DataError naming the row for whatever would train the wrong tokens, or none."""
        encoded = self.encode_all([row])[0]
        if isinstance(encoded, DataError):
            raise encoded
        return encoded

    def encode_all(self, rows: Sequence[Conversation]) -> list[Encoded | DataError]:
        """Rows as tokens, in one call of the tokenizer; an unusable row gives the DataError that `encode` raises.

        Raises DataError if no row can be encoded, as without any chat template.
        """
        results: dict[int, Encoded | DataError] = {}
        rendered: dict[int, Rendered] = {}
        plain = [index for index, row in enumerate(rows) if row.messages[0].role == TEXT]
        if len(plain) < len(rows):
            self.template.require()
        for index, row in enumerate(rows):
            if row.messages[0].role != TEXT:
                try:
                    rendered[index] = self.template.render(row)
                except DataError as error:
                    results[index] = error
        texts, spans = [item.text for item in rendered.values()], [item.spans for item in rendered.values()]
        spread = vocabulary.token_spans(self.tokenizer, texts, spans)
        for (index, item), (ids, trained) in zip(rendered.items(), spread, strict=True):
            results[index] = self._finished(rows[index], ids, trained, item.closed, item.shortened)
        for index, ids in zip(plain, self._plain([rows[index].messages[0].content for index in plain]), strict=True):
            closed = bool(len(ids)) and int(ids[-1]) == self.tokenizer.eos_token_id
            results[index] = self._finished(rows[index], ids, np.ones(len(ids), np.bool_), closed, 0)
        return [results[index] for index in range(len(rows))]

    def prompt_ids(self, text: str) -> list[int]:
        """What the model is given to answer a user's `text`: its turn and the template's call for an answer, as ids.

        Without a template it is the text itself, to be continued. Raises DataError if the template refuses the text or
        no token is left of it.
        """
        end = self.tokenizer.eos_token_id
        if self.template.text:
            ids = vocabulary.token_spans(self.tokenizer, [self._called(text)], [[]])[0][0]
        else:
            ids = self._plain([text])[0]
            if len(ids) and ids[-1] == end != self.tokenizer.bos_token_id:  # some tokenizers close every text
                ids = ids[:-1]
        if not len(ids):
            raise DataError(f"sample.prompts: {text!r} holds no token of this tokenizer; write at least a word")
        return [int(token) for token in ids[self._surplus(ids) :]]

    def _called(self, text: str) -> str:
        """A user's turn, rendered up to where the answer begins."""
        turn = Message("user", text)
        rendered = self.template.render(Conversation((turn, Message("assistant", "a")), "sample.prompts"))
        before = rendered.text[: rendered.spans[0][0]]
        own = self.template._try((turn,), prompt=True)
        # The template's own may go on with the beginning of a thought; some templates do not heed the call at all.
        return own if own.startswith(before) else before

    def _plain(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        if not texts:
            return []
        found = self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        return [np.array(ids, np.uint32) for ids in found["input_ids"]]

    def _finished(
        self, row: Conversation, ids: NDArray[np.uint32], trained: NDArray[np.bool_], closed: bool, shortened: int
    ) -> Encoded | DataError:
        """With an end token where the template writes none, and one start token at most."""
        end = self.tokenizer.eos_token_id
        if not closed:
            if end is None:
                return _endless(row.source)
            ids, trained = np.append(ids, np.uint32(end)), np.append(trained, True)
        surplus = self._surplus(ids)
        ids, trained = ids[surplus:], trained[surplus:]
        trained[:1] = False
        if not trained.any():
            return DataError(
                f'{row.source}: has no trained token (every answer has "weight": 0, or the template\'s generation '
                f"marks hold nothing); correct the row, {SKIP}"
            )
        control = sum(len(self._control.findall(message.content)) for message in row.messages)
        return Encoded(ids, trained, shortened, control)

    def _surplus(self, ids: NDArray[np.uint32]) -> int:
        """Start tokens in front of the one that belongs there."""
        start, count = self.tokenizer.bos_token_id, 0
        while start is not None and count + 1 < len(ids) and ids[count] == ids[count + 1] == start:
            count += 1
        return count


def preview_row(tokenizer: Any, row: Encoded) -> str:
    """A row as text with its trained tokens in ⟦ ⟧: for logs, so that a wrong mask is seen at once."""
    parts = []
    borders = [0, *(np.flatnonzero(np.diff(row.trained)) + 1).tolist(), len(row.ids)]
    for begin, stop in itertools.pairwise(borders):
        text = tokenizer.decode(row.ids[begin:stop].tolist(), clean_up_tokenization_spaces=False)
        parts.append(f"⟦{text}⟧" if row.trained[begin] else text)
    return "".join(parts)


def _endless(where: str) -> DataError:
    return DataError(
        f"{where}: neither template nor tokenizer has an end token, so the model would never stop; give the tokenizer "
        "an eos_token, or try data.chat_template=chatml"
    )
