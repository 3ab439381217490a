"""How records look in a notebook: thumbnails, tables and curves as HTML that is complete in itself.

Importing this module gives every record its look (`RENDERERS`). Whatever lies in an image folder may be damaged or gone
by the time a record is shown, so nothing here raises for a missing file.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from finetune.config.schema import Config
from finetune.planning.plan import Plan
from finetune.reporting import curves
from finetune.reporting.facts import (
    adapter_table,
    caption_counts,
    dataset_facts,
    plan_tables,
    profile_tables,
    record_facts,
    run_facts,
    text_set_facts,
    verdict_lines,
)
from finetune.reporting.tables import answers_table, by_prompt_html, facts_table, marked_html, more_html, table_of
from finetune.reporting.text import text
from finetune.reporting.thumbnails import image_html
from finetune.run.records import Adapter, Answers, CaptionSet, Dataset, Report, Result, Run, Samples, TextSet
from finetune.run.step_time import Profile

MOST_ITEMS = 60  # captions or answers shown; the rest is counted
THUMBNAIL = 128  # pixels
GRID_SIDE = 1600  # pixels: two prompts beside one another, four small images each


def _captions(captions: CaptionSet) -> str:
    """Thumbnails beside captions, in as many columns as there is room for."""
    shown = captions.items[:MOST_ITEMS]
    items = "".join(
        f'<div style="display:flex;gap:0.8em;width:21em;line-height:1.3">'
        f'<div style="flex:none;width:6em">{image_html(Path(captions.folder) / item.file, THUMBNAIL, item.file)}</div>'
        f"<div>{escape(item.text)}<br><small>{escape(item.file)}, {escape(item.source)}</small></div></div>"
        for item in shown
    )
    head = f'<p class="note"><b>{escape(captions.folder)}</b>: {caption_counts(captions)}</p>'
    grid = f'<div style="display:flex;flex-wrap:wrap;gap:1em">{items}</div>'
    return head + grid + more_html(len(captions.items), len(shown), "metadata.jsonl")


def _text_set(texts: TextSet) -> str:
    """What became of the conversations, and one of them as the model sees it."""
    note = '<p class="note">One row as the model sees it. Only the <mark>highlighted</mark> tokens are trained.</p>'
    return facts_table("data set", text_set_facts(texts)) + (note + marked_html(texts.preview) if texts.preview else "")


def _run(run: Run) -> str:
    """The loss curve over the figures."""
    drawn = curves.loss(curves.read(Path(run.folder)))
    chart = f'<div style="max-width:640px">{drawn}</div>' if drawn else ""
    return chart + facts_table("run", run_facts(run))


def _adapter(adapter: Adapter) -> str:
    trigger = f"; put the trigger phrase <b>{escape(adapter.trigger)}</b> into the prompt" if adapter.trigger else ""
    head = f'<p class="note">For {escape(adapter.base)}, in {escape(adapter.folder)}{trigger}</p>'
    return head + table_of(adapter_table(adapter))


def _samples(samples: Samples) -> str:
    """The grid of base beside tuned; nothing where nothing was drawn."""
    return image_html(Path(samples.grid), GRID_SIDE, "base beside tuned, for each prompt") if samples.page else ""


def _answers(answers: Answers) -> str:
    """Per prompt the base's answers beside the tuned ones."""
    shown = answers.items[:MOST_ITEMS]
    return by_prompt_html(shown, answers_table) + more_html(len(answers.items), len(shown), Path(answers.page).name)


def _plan(plan: Plan) -> str:
    """Problems, settings, memory and phases beside the GPU's budget, and what the figures rest on."""
    problems = "".join(f"<p><b>{escape(problem)}</b></p>" for problem in plan.refusals)
    tables = "".join(map(table_of, plan_tables(plan)))
    return f"{problems}{tables}<p>{'<br>'.join(map(escape, plan.notes))}</p>"


def _profile(profile: Profile) -> str:
    """Where a step's time goes, and below what to change."""
    tables = "".join(map(table_of, profile_tables(profile)))
    return f"{tables}<p>{'<br>'.join(map(escape, verdict_lines(profile)))}</p>"


def _fields(record: Any) -> str:
    """A record without a look of its own."""
    return facts_table(type(record).__name__.lower(), record_facts(record))


def html(record: Any) -> str:
    """Any record as HTML."""
    return RENDERERS.get(type(record), _fields)(record)


def give_look(record_type: type) -> None:
    """Let notebooks and Python's prompt show records of this type, those without an entry in `RENDERERS` by their
    fields."""
    record_type._repr_html_ = RENDERERS.get(record_type, _fields)  # type: ignore[attr-defined]  # Jupyter asks for it
    record_type.__repr__ = text  # type: ignore[method-assign,assignment]  # that of a thousand captions fills screens


RENDERERS: dict[type, Callable[[Any], str]] = {
    Config: lambda config: f"<pre>{escape(text(config))}</pre>",
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
    Profile: _profile,
}
"""Record -> how a notebook shows it."""

for _record in RENDERERS:
    give_look(_record)
