"""Facts, conversations and answers as HTML, for reports and notebooks; line breaks and spaces stay as they are."""

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TypeVar

from finetune.reporting.facts import Fact, Table
from finetune.run.records import Answer, Sample, by_prompt

S = TypeVar("S", Sample, Answer)

MOST_MARKED = 6000  # characters of a conversation that are shown
BRACKETS = re.compile(r"([⟦⟧])")
SPACED = "white-space:pre-wrap;overflow-wrap:anywhere"  # here and not in a style sheet: a notebook has none


def table_html(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. head: plain words; rows: HTML, already escaped."""
    titles = "".join(f'<th style="text-align:left">{escape(title)}</th>' for title in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left;vertical-align:top">{cell}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def table_of(table: Table) -> str:
    """A table of plain text."""
    return table_html((table.title, *table.head), [[escape(cell) for cell in row] for row in table.rows])


def facts_table(title: str, facts: Iterable[Fact]) -> str:
    """Labels beside their values."""
    return table_of(Table(title, ("",), [(fact.label, fact.text) for fact in facts]))


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


def by_prompt_html(items: Sequence[S], draw: Callable[[Sequence[S]], str]) -> str:
    """Samples or answers, those of a prompt under its words, as `draw` shows them."""
    articles = (
        f'<article class="prompt"><h3 style="{SPACED}">{escape(prompt)}</h3>{draw(some)}</article>'
        for prompt, some in by_prompt(items).items()
    )
    return f'<div class="prompts">{"".join(articles)}</div>' if items else ""


def answers_table(items: Sequence[Answer]) -> str:
    """The base's answers beside the tuned ones, a row each; the seed goes before them if there are several."""
    rows = [[str(item.seed), _answer(item.base), _answer(item.tuned)] for item in items]
    first = 0 if len({item.seed for item in items}) > 1 else 1
    return table_html(("seed", "base", "tuned")[first:], [row[first:] for row in rows])


def _answer(text: str) -> str:
    if not text:
        return "<em>empty answer</em>"
    return f'<div class="answer" style="{SPACED};min-width:min(12em,25vw)">{escape(text)}</div>'


def more_html(count: int, shown: int, where: str) -> str:
    """Where to find the rest of a long list."""
    return f'<p class="note">and {count - shown:,} more in {escape(where)}</p>' if count > shown else ""
