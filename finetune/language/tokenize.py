"""Conversations -> token rows of a language model, with what became of them said out loud."""

from pathlib import Path
from typing import Any

from finetune.config.describe import as_dict
from finetune.config.schema import Config
from finetune.data.text import formats, packing, readers, store
from finetune.data.text.formats import Source
from finetune.data.text.tokens import Chat, marked
from finetune.errors import DataError
from finetune.language.causal_lm import load_tokenizer
from finetune.run.progress import say
from finetune.run.records import CaptionSet, TextSet, hash_of


def chat_of(config: Config) -> Chat:
    """The base's tokenizer with the recipe's chat template. Raises ModelError, DataError."""
    return Chat(load_tokenizer(config.model.base, config.model.added_tokens), template=config.data.chat_template)


def inputs(config: Config, captions: CaptionSet | None) -> list[Any]:
    """The files by content, the tokenizer with its template, and every setting of the data."""
    files = readers.files_of(Path(config.data.file))
    return [readers.content_hash(files), chat_of(config).identity, as_dict(config)["data"], config.seed]


def complete(record: TextSet) -> bool:
    """Whether every byte of the rows is still there."""
    try:
        store.reopen(Path(record.rows), whole=True)
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
        "lost_share": record.lost,
        "packs": record.packs,
        "filled_share": record.real,
        "trained_share": record.learnt,
        "near_duplicates": record.leaked,
        "unusable": record.bad,
    }


def build(config: Config, captions: CaptionSet | None) -> TextSet:
    """Read, tokenise and cache every conversation; say what was cut, left out, doubled or leaked to the held-out part.

    Raises DataError naming the row for whatever would train the wrong tokens.
    """
    data, chat = config.data, chat_of(config)
    source: Source = formats.open_source(Path(data.file), format_=data.format)
    say(f"dataset: {source}")
    found = store.prepare(
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
    leaked, _ = found.leaked(data.validation_share)
    if leaked:
        say(f"warning: {leaked:,} of {len(held_out):,} held-out conversations nearly equal one that is trained on")
    if doubled := found.duplicates():
        say(f"warning: {doubled:,} conversations are there more than once")
    lengths, trained = found.lengths[train], found.trained[train]
    fill = packing.utilisation(lengths, trained, length=data.length, seed=config.seed, pack=data.packing)
    say(f"dataset: {fill}")
    return TextSet(
        rows=str(found.folder),
        content=hash_of(found.folder.name, data.validation_share, data.packing)[:16],
        source=str(source),
        train=len(train),
        validation=len(held_out),
        tokens=found.figures.tokens,
        trained=found.figures.trained,
        lost=found.figures.lost,
        packs=fill.packs,
        real=fill.real / fill.slots,
        learnt=fill.trained / fill.slots,
        marked=marked(chat.tokenizer, found[int(train[0])]),
        leaked=leaked,
        bad=found.figures.bad,
        cached=found.cached,
    )
