"""Records as plain text: what the command line prints of them, and what Python shows at its prompt."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finetune.config.describe import as_dict
from finetune.config.recipes import shown
from finetune.config.schema import Config
from finetune.planning.plan import Plan
from finetune.reporting.facts import (
    Fact,
    Table,
    caption_counts,
    dataset_facts,
    plan_tables,
    profile_tables,
    record_facts,
    run_facts,
    text_set_facts,
    verdict_lines,
)
from finetune.run.records import Adapter, Answers, CaptionSet, Dataset, Report, Result, Run, Samples, TextSet
from finetune.run.step_time import Profile

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NUMBERS = ("ms", "share", "GiB", "time", "s/step", "images/s", "tokens/s", "loss", "validation")
MOST_PREVIEWED = 1200  # characters of a row: about a screen
WIDTH = 80  # columns


def text(record: Any) -> str:
    """Any record in a few lines."""
    return TEXTS.get(type(record), _fields)(record)


def result_facts(result: Result, settings: Mapping[str, Any] | None = None) -> list[Fact]:
    """What the training did, and where its files are."""
    samples = "answers" if isinstance(result.samples, Answers) else "grid"
    return [
        *run_facts(result.run, result.dataset, settings),
        Fact("adapter", shown(Path(result.adapter.folder))),
        Fact(samples, shown(Path(result.samples.page)) if result.samples.page else "none", _why_none(result.samples)),
        Fact("report", shown(Path(result.report.file))),
    ]


def rich_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> "RichTable":
    """A table for a `rich` console, its numbers to the right."""
    from rich.table import Table as RichTable

    table = RichTable(title=title or None, title_justify="left", show_header=any(head), box=None, pad_edge=False)
    for name in head:
        table.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _why_none(samples: Samples | Answers) -> str:
    return "" if samples.page else "sample.prompts is empty"


def _facts(title: str, facts: Sequence[Fact]) -> str:
    return "\n".join([title, *(f"  {fact.label}: {fact.text}" for fact in facts)])


def _fields(record: Any) -> str:
    """A record without a text of its own."""
    return _facts(type(record).__name__.lower(), record_facts(record))


def _preview(row: str) -> str:
    """One row as the model sees it, cut where it is long."""
    if not row:
        return ""
    start = row[:MOST_PREVIEWED] + (" …" if len(row) > MOST_PREVIEWED else "")
    return "\none row as the model sees it, trained is what stands in ⟦ ⟧\n" + textwrap.indent(start, "  ")


def _samples(samples: Samples | Answers) -> str:
    return f"samples: {samples.page or f'none ({_why_none(samples)})'}"


def _answers(answers: Answers) -> str:
    pairs = (f"{item.prompt}\n  base:  {item.base}\n  tuned: {item.tuned}\n" for item in answers.items)
    return "".join(pairs) + _samples(answers)


def _tables(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables under one another, and notes below."""
    from rich.console import Console

    lines = io.StringIO()
    console = Console(file=lines, width=WIDTH, force_terminal=False, highlight=False, markup=False)
    for index, table in enumerate(tables):
        console.print(rich_table(f"\n{table.title}" if index else table.title, ("", *table.head), table.rows))
    console.print(rich_table("", ("", ""), [("·", line) for line in notes]))
    return lines.getvalue().rstrip()


TEXTS: dict[type, Callable[[Any], str]] = {
    Config: lambda config: yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True, width=WIDTH).rstrip(),
    CaptionSet: lambda captions: (
        f"captions: {caption_counts(captions)}; correct them in {captions.folder}"
        + ("/metadata.jsonl" if all(item.source == "generated" for item in captions.items) else "")
    ),
    Dataset: lambda dataset: _facts("dataset", dataset_facts(dataset)),
    TextSet: lambda texts: _facts("dataset", text_set_facts(texts)) + _preview(texts.preview),
    Run: lambda run: _facts("train", run_facts(run)),
    Adapter: lambda adapter: f"adapter: {adapter.folder} ({', '.join(adapter.files.values())})",
    Samples: _samples,
    Answers: _answers,
    Report: lambda report: f"report: {report.file}",
    Result: lambda result: _facts("train", result_facts(result)),
    Plan: lambda plan: _tables(plan_tables(plan), (*plan.notes, *plan.refusals)),
    Profile: lambda profile: _tables(profile_tables(profile), verdict_lines(profile)),
}
"""Record -> its text; the command line lays out a `Result` and a `Plan` with more beside them."""
