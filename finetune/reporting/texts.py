"""Conversations and answers as HTML, for reports and notebooks; line breaks and spaces stay as they are."""

import re
from collections.abc import Sequence
from html import escape
from typing import TypeVar

from finetune.reporting.tables import plural, table_html
from finetune.run.records import Answer, Sample, TextSet

S = TypeVar("S", Sample, Answer)
MOST_MARKED = 6000  # characters of a conversation that are shown
BRACKETS = re.compile(r"([⟦⟧])")
SPACED = "white-space:pre-wrap;overflow-wrap:anywhere"  # here and not in a style sheet: a notebook has none


def by_prompt(items: Sequence[S]) -> dict[str, list[S]]:
    """Samples or answers by their prompt, in the order in which prompts first come."""
    prompts = dict.fromkeys(item.prompt for item in items)
    return {prompt: [item for item in items if item.prompt == prompt] for prompt in prompts}


def text_set_rows(texts: TextSet) -> list[list[str]]:
    """What became of the conversations: name, figure."""
    share = texts.trained / texts.tokens if texts.tokens else 0.0
    fill = f"{texts.fill_share:.1%} filled, {texts.trained_share:.1%} with trained tokens"
    rows = [
        ["read from", escape(texts.source)],
        ["rows to train on", f"{texts.train:,}"],
        ["rows held out", f"{texts.validation:,}"],
        ["tokens", f"{texts.tokens:,}"],
        ["trained tokens", f"{texts.trained:,} ({share:.1%})"],
        ["an epoch", f"{plural(texts.packs, 'pack')}, {fill}"],
        ["encoded", "earlier, found in the cache" if texts.cached else "now"],
    ]
    if texts.truncated_share:
        rows.append(["trained tokens lost to the length", f"{texts.truncated_share:.2%}"])
    if texts.bad:
        rows.append(["unusable rows that were left out", f"{texts.bad:,}"])
    return rows


def marked_html(text: str) -> str:
    """A text whose trained parts stand in ⟦ ⟧, with these highlighted instead."""
    parts, inside = [], False
    for part in BRACKETS.split(text[:MOST_MARKED]):
        if part == ("⟧" if inside else "⟦"):
            parts.append("</mark>" if inside else "<mark>")
            inside = not inside
        else:  # a bracket that opens or closes nothing belongs to the text
            parts.append(escape(part))
    end = "</mark>" if inside else ""
    cut = " …" if len(text) > MOST_MARKED else ""
    return f'<div class="row" style="{SPACED}">{"".join(parts)}{end}{cut}</div>'


def answers_table(items: Sequence[Answer]) -> str:
    """The base's answers beside the tuned ones, a row each; the seed goes before them if there are several."""
    several = len({item.seed for item in items}) > 1
    rows = [
        [*([str(item.seed)] if several else []), *(_answer(text) for text in (item.base, item.tuned))] for item in items
    ]
    return table_html((*(["seed"] if several else []), "base", "tuned"), rows)


def _answer(text: str) -> str:
    if not text:
        return "<em>nothing</em>"
    return f'<div class="answer" style="{SPACED};min-width:min(12em,25vw)">{escape(text)}</div>'
