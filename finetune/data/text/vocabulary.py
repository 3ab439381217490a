"""What the data side has to know about a tokenizer: its control tokens, identity, and where its tokens lie."""

import hashlib
import itertools
import json
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens of a tokenizer, as they are spelled."""
    added = [entry.content for entry in tokenizer.added_tokens_decoder.values() if entry.special]
    return tuple(sorted({*tokenizer.all_special_tokens, *added}))


def content_hash(tokenizer: Any, template: str = "") -> str:
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
