"""From a conversation to token ids and the mask of trained tokens, by the tokenizer's own chat template.

Trained are the assistant's turns, each with the token that ends it, and nothing else; of plain text, all of it. A
conversation is rendered and tokenised once and whole, so its ids are those of `apply_chat_template`.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.text.formats import TEXT, Conversation, Message
from finetune.data.text.template import SKIP, Rendered, Template
from finetune.errors import DataError

# T tokens of a row


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row. ids (T,) uint32; trained (T,) bool: whether the token is a target, predicted from those before it.

    The first token has none before it and is never trained. shortened: answers of which the template leaves out a part
    (earlier thinking). control: control tokens that the messages' own texts contain.
    """

    ids: NDArray[np.uint32]
    trained: NDArray[np.bool_]
    shortened: int = 0
    control: int = 0


class Chat:
    """A tokenizer with a chat template; pickles, so that several processes may encode.

    template: as `Template` takes it. A tokenizer without one still takes plain text.
    """

    def __init__(self, tokenizer: Any, *, template: str = "") -> None:
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, template)
        control = map(re.escape, control_tokens(tokenizer))
        self._control = re.compile("|".join(control) or r"(?!)")

    @property
    def content_hash(self) -> str:
        """Hash (hex) of everything that decides ids and masks."""
        return content_hash(self.tokenizer, self.template.text)

    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: what a sampler must stop at. Raises DataError where there are none."""
        turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
        turn_ends = self.template.turn_ends(turns, "the chat template") if self.template.text else ()
        last = [self.template.last_token(turn_end) for turn_end in turn_ends if self.template.is_token(turn_end)]
        found = [self.tokenizer.convert_tokens_to_ids(token) for token in last]
        eos = self.tokenizer.eos_token_id
        if not found and eos is None:
            raise _no_end_token("the chat template")
        return tuple(dict.fromkeys([*found, *([eos] if eos is not None else [])]))

    def encode(self, row: Conversation) -> Encoded:
        """One row as tokens. Raises DataError naming the row for whatever would train the wrong tokens, or none."""
        encoded = self.encode_batch([row])[0]
        if isinstance(encoded, DataError):
            raise encoded
        return encoded

    def encode_batch(self, rows: Sequence[Conversation]) -> list[Encoded | DataError]:
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
        tokenized = token_spans(self.tokenizer, texts, spans)
        for (index, item), (ids, trained) in zip(rendered.items(), tokenized, strict=True):
            results[index] = self._finished(rows[index], ids, trained, item.has_end_token, item.shortened)
        for index, ids in zip(plain, self._plain_ids([rows[i].messages[0].content for i in plain]), strict=True):
            has_end_token = bool(len(ids)) and int(ids[-1]) == self.tokenizer.eos_token_id
            results[index] = self._finished(rows[index], ids, np.ones(len(ids), np.bool_), has_end_token, 0)
        return [results[index] for index in range(len(rows))]

    def prompt_ids(self, text: str) -> list[int]:
        """The ids behind which the model answers a user's `text`: the turn with the template's generation prompt.

        Without a template it is the text itself, to be continued. Raises DataError if the template refuses the text or
        no token is left of it.
        """
        if self.template.text:
            return self.answer_ids([Message("user", text)], "sample.prompts")
        return self.text_ids(text, "sample.prompts")

    def answer_ids(self, turns: Sequence[Message], source: str) -> list[int]:
        """The ids behind which the model writes the next answer of a conversation. Raises DataError as `prompt_ids`,
        and where there is no template."""
        self.template.require()
        for turn in turns:
            _require_whole(turn.content, source)
        ids = token_spans(self.tokenizer, [self.template.generation_prompt(turns, source)], [[]])[0][0]
        return [int(token) for token in ids[self._repeated_bos(ids) :]]

    def text_ids(self, text: str, source: str) -> list[int]:
        """The ids of a text to be continued, whatever the template. Raises DataError if no token is left of it."""
        _require_whole(text, source)
        ids = self._plain_ids([text])[0]
        eos = self.tokenizer.eos_token_id
        if len(ids) and ids[-1] == eos != self.tokenizer.bos_token_id:  # some tokenizers end every text
            ids = ids[:-1]
        if not len(ids):
            raise DataError(f"{source}: {text!r} holds no token of this tokenizer; write at least a word")
        return [int(token) for token in ids[self._repeated_bos(ids) :]]

    def _plain_ids(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        if not texts:
            return []
        found = self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        return [np.array(ids, np.uint32) for ids in found["input_ids"]]

    def _finished(
        self, row: Conversation, ids: NDArray[np.uint32], trained: NDArray[np.bool_], has_end: bool, shortened: int
    ) -> Encoded | DataError:
        """With an end token where the template writes none, and one start token at most."""
        if not has_end:
            if self.tokenizer.eos_token_id is None:
                return _no_end_token(row.source)
            ids, trained = np.append(ids, np.uint32(self.tokenizer.eos_token_id)), np.append(trained, True)
        repeated = self._repeated_bos(ids)
        ids, trained = ids[repeated:], trained[repeated:]
        trained[:1] = False
        if not trained.any():
            return DataError(
                f'{row.source}: has no trained token (every answer has "weight": 0, or the template\'s generation '
                f"marks hold nothing); correct the row, {SKIP}"
            )
        control = sum(len(self._control.findall(message.content)) for message in row.messages)
        return Encoded(ids, trained, shortened, control)

    def _repeated_bos(self, ids: NDArray[np.uint32]) -> int:
        """Start tokens in front of the one that belongs there: a template and its tokenizer may each write one."""
        bos, count = self.tokenizer.bos_token_id, 0
        while bos is not None and count + 1 < len(ids) and ids[count] == ids[count + 1] == bos:
            count += 1
        return count


def _require_whole(text: str, source: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: {text!a} has half a character, which no tokenizer takes") from error


def preview_row(tokenizer: Any, row: Encoded) -> str:
    """A row as text with its trained tokens in ⟦ ⟧: for logs, so that a wrong mask is seen at once."""
    parts = []
    borders = [0, *(np.flatnonzero(np.diff(row.trained)) + 1).tolist(), len(row.ids)]
    for begin, stop in itertools.pairwise(borders):
        text = tokenizer.decode(row.ids[begin:stop].tolist(), clean_up_tokenization_spaces=False)
        parts.append(f"⟦{text}⟧" if row.trained[begin] else text)
    return "".join(parts)


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens of a tokenizer, as texts."""
    added = [entry.content for entry in tokenizer.added_tokens_decoder.values() if entry.special]
    return tuple(sorted({*tokenizer.all_special_tokens, *added}))


def content_hash(tokenizer: Any, template: str = "") -> str:
    """sha256 (hex) of a tokenizer with its template, whatever its path, padding or truncation."""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        whole.pop("padding", None)
        whole.pop("truncation", None)
        digest.update(json.dumps(whole, sort_keys=True).encode())
    else:
        digest.update(json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]).encode())
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    digest.update(json.dumps([names, template], sort_keys=True).encode())
    return digest.hexdigest()


def token_spans(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
) -> list[tuple[NDArray[np.uint32], NDArray[np.bool_]]]:
    """Each text's ids and which of them (T,) hold a character of its spans, (from, to) in characters.

    No token is added. A control token that lies in a span only by white space that it swallows is not counted in.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [_without_offsets(tokenizer, text, parts) for text, parts in zip(texts, spans, strict=True)]
    output = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    added = frozenset(tokenizer.added_tokens_decoder)
    found = []
    for ids, offsets, parts in zip(output["input_ids"], output["offset_mapping"], spans, strict=True):
        array = np.array(ids, np.uint32)
        found.append((array, _covered(ids, offsets, parts, added)))
    return found


def _covered(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], added: Set[int]
) -> NDArray[np.bool_]:
    """Which tokens lie in the spans.

    Only the ends of tokens are trusted, and each begins where the one before it ended: vocabularies that trim offsets
    report a space as nothing, at its end. Tokens within one character (bytes of an emoji) go with the first of them.
    """
    count = len(ids)
    if not count:
        return np.zeros(0, np.bool_)
    stops = np.maximum.accumulate(np.array([stop for _, stop in offsets], np.int64))
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
    trained = np.zeros(count, np.bool_)
    for begin, stop in spans:
        first, last = int(np.searchsorted(stops, begin, "right")), int(np.searchsorted(starts, stop, "left"))
        if first < last and starts[first] < begin and ids[first] in added:
            first += 1
        trained[first:last] = True
    wide = stops > starts
    if wide.all():
        return trained
    return trained[np.maximum.accumulate(np.where(wide, np.arange(count), 0))]


def _without_offsets(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """For tokenizers written in Python: the text is tokenised piece by piece, so that every border is a token's."""
    ids: list[int] = []
    trained: list[bool] = []
    borders = [0]
    for begin, stop in sorted(spans):  # marks may overlap with what was added to them
        if begin > borders[-1] or len(borders) == 1:
            borders += [begin, stop]
        else:
            borders[-1] = max(borders[-1], stop)
    borders.append(len(text))
    for number, (begin, stop) in enumerate(itertools.pairwise(borders)):
        piece = tokenizer.encode(text[begin:stop], add_special_tokens=False) if stop > begin else []
        ids += piece
        trained += [number % 2 == 1] * len(piece)
    return np.array(ids, np.uint32), np.array(trained, np.bool_)


def _no_end_token(where: str) -> DataError:
    return DataError(
        f"{where}: neither template nor tokenizer has an end token, so the model would never stop; give the tokenizer "
        "an eos_token, or try data.chat_template=chatml"
    )
