"""Conversations -> token rows of a language model, with what became of them said out loud."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune import hub
from finetune.config.describe import as_dict
from finetune.config.schema import Config, DataConfig, ModelConfig
from finetune.config.spelling import setting
from finetune.data.text import formats, packing, readers, store
from finetune.data.text.formats import Source
from finetune.data.text.tokens import Chat, preview_row
from finetune.errors import DataError
from finetune.language.causal_lm import load_tokenizer
from finetune.run.hashing import hash_of
from finetune.run.progress import plural, say
from finetune.run.records import CaptionSet, TextSet

MOST_NAMED = 8  # files in one line


def chat_of(model: ModelConfig, data: DataConfig) -> Chat:
    """The base's tokenizer with the recipe's chat template. Raises ModelError, DataError."""
    return Chat(load_tokenizer(model.base, model.added_tokens), template=data.chat_template)


def require_examples(model: ModelConfig, data: DataConfig, seconds: float) -> None:
    """Raises what `build` raises for rows that are encoded in so many seconds; of a base that is on this machine."""
    here = hub.local(model.base)
    if here is None:  # the first rows are looked at when they are counted
        return
    looked = store.look(
        _source(data),
        chat_of(replace(model, base=str(here)), data),
        length=data.length,
        long_rows=data.long_rows,
        skip_bad=data.skip_bad,
        seconds=seconds,
    )
    if looked:
        say(f"the first {plural(looked, 'conversation')} were looked at; train looks at all of them")


def inputs(config: Config, captions: CaptionSet | None) -> list[Any]:
    """The files by content, the tokenizer with its template, and every setting of the data."""
    files, data = readers.files_of(Path(config.data.file)), as_dict(config)["data"]
    if not data["columns"]:
        del data["columns"]  # data sets from before there were any stay up to date
    return [
        readers.content_hash(files),
        chat_of(config.model, config.data).content_hash,
        data,
        config.seed,
    ]


def complete(record: TextSet) -> bool:
    """Whether every byte of the rows is still there."""
    try:
        store.open_store(Path(record.rows), verify=True)
    except DataError:
        return False
    return True


def figures(record: TextSet) -> dict[str, float | int | str | None]:
    """For the receipt."""
    return {
        "train": record.train,
        "validation": record.validation,
        "tokens": record.tokens,
        "trained_tokens": record.trained,
        "lost_share": record.truncated_share,
        "packs": record.packs,
        "filled_share": record.fill_share,
        "trained_share": record.trained_share,
        "unusable": record.bad,
    }


def build(config: Config, captions: CaptionSet | None) -> TextSet:
    """Read, tokenise and cache every conversation; say what was truncated, left out or repeated.

    Raises DataError naming the row for whatever would train the wrong tokens.
    """
    data, chat = config.data, chat_of(config.model, config.data)
    source = _source(data)
    say(f"dataset: {source}")
    if others := [path for path in readers.held_out_files(source.path) if path not in source.files]:
        say(
            f"dataset: not trained on: {_names(others)} (by name a test or validation split; "
            f"to train on it too: {setting('data.file', os.pathsep.join(map(str, (source.path, others[0]))))})"
        )
    unrelated, folders = readers.passed_over(source.path)
    if unrelated:
        say(f"dataset: not read: {_names(unrelated)} (no column of it is one of conversations)")
    if folders:
        say(f"dataset: folders are not searched: {_names(folders)}; name one: {setting('data.file', folders[0])}")
    found = store.encode_or_load(
        source,
        chat,
        cache=Path(data.cache),
        length=data.length,
        long_rows=data.long_rows,
        skip_bad=data.skip_bad,
        workers=data.workers,
    )
    for line in found.figures.lines():
        say(f"dataset: {line}")
    train, held_out = found.split(data.validation_share)
    if repeated := found.duplicates():
        say(f"warning: more than once: {plural(repeated, 'conversation')}")
    lengths, trained = found.lengths[train], found.trained[train]
    fill = packing.packing_stats(lengths, trained, length=data.length, seed=config.seed, pack=data.packing)
    say(f"dataset: {fill}")
    return TextSet(
        rows=str(found.folder),
        content=hash_of(found.folder.name, data.validation_share, data.packing)[:16],
        source=str(source).encode(errors="backslashreplace").decode(),  # not every file has a name in UTF-8
        train=len(train),
        validation=len(held_out),
        tokens=found.figures.tokens,
        trained=found.figures.trained,
        truncated_share=found.figures.truncated_share,
        packs=fill.packs,
        fill_share=fill.tokens / fill.capacity,
        trained_share=fill.trained / fill.capacity,
        preview=preview_row(chat.tokenizer, found[int(train[0])]),
        bad=found.figures.bad,
        cached=found.cached,
    )


def _source(data: DataConfig) -> Source:
    return formats.open_source(Path(data.file), format_=data.format, columns=data.columns, skip_bad=data.skip_bad)


def _names(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
    return ", ".join(path.name for path in paths[:MOST_NAMED]) + more
