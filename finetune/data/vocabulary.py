"""What the data side has to know about a tokenizer: its control tokens, padding, identity, and where its tokens lie."""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Names that vocabularies give to tokens nobody uses: Llama 3, Qwen, Mistral, Phi, Gemma, GLM, BERT.
SPARE = (r"pad", r"finetune_right_pad", r"reserved", r"unused", r"dummy", r"placeholder")


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens of a tokenizer, as they are spelled."""
    added = [entry.content for entry in tokenizer.added_tokens_decoder.values() if entry.special]
    return tuple(sorted({*tokenizer.all_special_tokens, *added}))


def padding(tokenizer: Any, *, ends: Sequence[int] = ()) -> tuple[int, str]:
    """The id to pad with and, for the log, why. ends: ids that end an answer.

    Never an id that ends an answer where there is any other: elsewhere (other libraries mask padding by its id) a model
    that was trained so never stops. The tokenizer's vocabulary is not changed.
    """
    forbidden = {*ends, tokenizer.eos_token_id}
    own = tokenizer.pad_token_id
    if own is not None and own not in forbidden:
        return own, f"padding with the tokenizer's own {tokenizer.pad_token}"
    why = f"its {tokenizer.pad_token} ends answers" if own is not None else "the tokenizer has no padding token"
    special = {key: entry.content for key, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    for pattern in SPARE:
        for key, token in sorted(special.items()):
            if key not in forbidden and re.search(pattern, token, re.IGNORECASE):
                return key, f"padding with {token}: {why}"
    for key, name in ((tokenizer.unk_token_id, "unknown token"), (tokenizer.bos_token_id, "start token")):
        if key is not None and key not in forbidden:
            return key, f"padding with the {name} {tokenizer.convert_ids_to_tokens(key)}: {why}"
    return 0 if 0 not in forbidden else 1, f"padding with the token of id {int(0 in forbidden)}: {why}"


def identity(tokenizer: Any, template: str = "") -> str:
    """Who a tokenizer with its template is, by content: sha256 (hex), whatever its path or padding."""
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
