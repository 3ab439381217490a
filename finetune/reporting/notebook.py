"""How records look in a notebook: thumbnails, tables and curves as HTML that is complete in itself.

Importing this module gives every record its look (`RENDERERS`). Whatever lies in an image folder may be damaged or gone
by the time a record is shown, so nothing here raises for a missing file.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from finetune.planning.plan import Plan
from finetune.reporting import curves
from finetune.reporting.facts import caption_counts, dataset_facts, plan_tables, run_facts, text_set_facts
from finetune.reporting.tables import (
    SPACED,
    adapter_table,
    answers_table,
    facts_table,
    marked_html,
    plain_table,
    table_html,
)
from finetune.reporting.thumbnails import image_html
from finetune.run.records import (
    Adapter,
    Answers,
    CaptionSet,
    Dataset,
    Report,
    Result,
    Run,
    Samples,
    TextSet,
    by_prompt,
)

MOST_ROWS = 60  # captions shown; the rest is counted
THUMBNAIL = 96  # pixels
GRID_SIDE = 1600  # pixels: two prompts beside one another, four small images each


def _captions(captions: CaptionSet) -> str:
    """Thumbnails beside captions."""
    rows = [
        [image_html(Path(captions.folder) / item.file, THUMBNAIL, item.file), escape(item.text), escape(item.source)]
        for item in captions.items[:MOST_ROWS]
    ]
    head = f"<p><b>{escape(captions.folder)}</b>: {caption_counts(captions)}</p>"
    return head + table_html(("", "caption", "from"), rows) + _more(len(captions.items), "metadata.jsonl")


def _text_set(texts: TextSet) -> str:
    """What became of the conversations, and one of them as the model sees it."""
    row = f"<p>One row, its trained tokens highlighted:</p>{marked_html(texts.preview)}" if texts.preview else ""
    return facts_table("data set", text_set_facts(texts)) + row


def _run(run: Run) -> str:
    """The loss curve over the figures."""
    drawn = curves.loss(curves.read(Path(run.folder)))
    chart = f'<div style="max-width:640px">{drawn}</div>' if drawn else ""
    return chart + facts_table("run", run_facts(run))


def _adapter(adapter: Adapter) -> str:
    trigger = f", trigger phrase <b>{escape(adapter.trigger)}</b>" if adapter.trigger else ""
    head = f"<p><b>Adapter</b> for {escape(adapter.base)} in {escape(adapter.folder)}{trigger}</p>"
    return head + adapter_table(adapter)


def _samples(samples: Samples) -> str:
    """The grid of base beside tuned; nothing where nothing was drawn."""
    return image_html(Path(samples.grid), GRID_SIDE, "base beside tuned, for each prompt") if samples.page else ""


def _answers(answers: Answers) -> str:
    """Per prompt the base's answers beside the tuned ones."""
    parts = [
        f'<p style="{SPACED}"><b>{escape(prompt)}</b></p>{answers_table(items)}'
        for prompt, items in by_prompt(answers.items[:MOST_ROWS]).items()
    ]
    return "".join(parts) + _more(len(answers.items), Path(answers.page).name)


def _plan(plan: Plan) -> str:
    """Problems, settings, memory and phases beside the GPU's budget, and what the figures rest on."""
    problems = "".join(f"<p><b>{escape(problem)}</b></p>" for problem in plan.problems)
    tables = "".join(plain_table((table.title, *table.head), table.rows) for table in plan_tables(plan))
    return f"{problems}{tables}<p>{'<br>'.join(map(escape, plan.notes))}</p>"


def html(record: Any) -> str:
    """Any record as HTML."""
    return RENDERERS[type(record)](record)


def _more(count: int, where: str) -> str:
    return f"<p>and {count - MOST_ROWS:,} more in {escape(where)}</p>" if count > MOST_ROWS else ""


RENDERERS: dict[type, Callable[[Any], str]] = {
    CaptionSet: _captions,
    Dataset: lambda dataset: facts_table("data set", dataset_facts(dataset)),
    TextSet: _text_set,
    Run: _run,
    Adapter: _adapter,
    Samples: _samples,
    Answers: _answers,
    Report: lambda report: f"<p><b>Report</b> in {escape(report.file)}</p>",
    Result: lambda result: "".join(map(html, (result.samples, result.run, result.adapter, result.dataset))),
    Plan: _plan,
}
"""Record -> how a notebook shows it."""

for _record, _draw in RENDERERS.items():
    _record._repr_html_ = _draw  # type: ignore[attr-defined]  # the method that Jupyter asks for
