"""How records look in a notebook: thumbnails, tables and curves as HTML that is complete in itself.

The report is put together from the same pieces. Whatever lies in an image folder may be damaged or gone by the time a
record is shown, so nothing here raises for a missing file.
"""

from html import escape
from pathlib import Path

from finetune.planning.plan import Plan
from finetune.reporting import curves, plan_tables
from finetune.reporting.tables import adapter_rows, plural, run_rows, table_html
from finetune.reporting.texts import SPACED, answers_table, by_prompt, marked_html, text_set_rows
from finetune.reporting.thumbnails import image_html
from finetune.run.records import Adapter, Answers, CaptionSet, Dataset, Run, Samples, TextSet

MOST_ROWS = 60  # captions shown; the rest is counted
THUMBNAIL = 96  # pixels
GRID_SIDE = 1600  # pixels: two prompts beside one another, four small images each


def captions_html(captions: CaptionSet) -> str:
    """Thumbnails beside captions."""
    generated = sum(item.source == "generated" for item in captions.items)
    rows = [
        [image_html(Path(captions.folder) / item.file, THUMBNAIL, item.file), *map(escape, (item.text, item.source))]
        for item in captions.items[:MOST_ROWS]
    ]
    parts = [f"<b>{plural(len(captions.items), 'image')}</b> in {escape(captions.folder)}", f"{generated} captioned"]
    if captions.skipped:
        parts.append(f"{len(captions.skipped)} unreadable and left out")
    more = _more(len(captions.items), "metadata.jsonl")
    return f"<p>{', '.join(parts)}</p>{table_html(('', 'caption', 'from'), rows)}{more}"


def dataset_html(dataset: Dataset) -> str:
    """How many examples, in which shapes, and what the cache saved."""
    shapes = [f"{count} of {escape(name)} pixels" for name, count in dataset.buckets.items()]
    rows = [
        ["to train on", f"{dataset.train:,}"],
        ["held out", f"{dataset.validation:,}"],
        ["shapes", ", ".join(shapes) or "–"],
        ["smaller than their shape", f"{dataset.upscaled:,}"],
        ["encoded now, found in the cache", f"{dataset.encoded:,}, {dataset.cached:,}"],
    ]
    return table_html(("data set", ""), rows)


def text_set_html(texts: TextSet) -> str:
    """What became of the conversations, and one of them as the model sees it."""
    row = f"<p>One row, its trained tokens highlighted:</p>{marked_html(texts.preview)}" if texts.preview else ""
    return table_html(("data set", ""), text_set_rows(texts)) + row


def run_html(run: Run) -> str:
    """The loss curve over a few figures."""
    drawn = curves.loss(curves.read(Path(run.folder)))
    chart = f'<div style="max-width:640px">{drawn}</div>' if drawn else ""
    return chart + table_html(("run", ""), run_rows(run))


def adapter_html(adapter: Adapter) -> str:
    """The exported files and how far each is from the trained module."""
    trigger = f", trigger phrase <b>{escape(adapter.trigger)}</b>" if adapter.trigger else ""
    head = f"<p><b>Adapter</b> for {escape(adapter.base)} in {escape(adapter.folder)}{trigger}</p>"
    return head + table_html(("format", "file", "size", "difference to the trained module"), adapter_rows(adapter))


def samples_html(samples: Samples) -> str:
    """The grid of base beside tuned; nothing where nothing was drawn."""
    if not samples.page:
        return ""
    return image_html(Path(samples.grid), GRID_SIDE, "base beside tuned, a prompt at a time")


def answers_html(answers: Answers) -> str:
    """Per prompt the base's answers beside the tuned ones."""
    parts = [
        f'<p style="{SPACED}"><b>{escape(prompt)}</b></p>{answers_table(items)}'
        for prompt, items in by_prompt(answers.items[:MOST_ROWS]).items()
    ]
    return "".join(parts) + _more(len(answers.items), Path(answers.page).name)


def plan_html(plan: Plan) -> str:
    """Settings, memory and phases beside the GPU's budget."""
    settings = [[escape(name), *map(escape, row)] for name, row in plan_tables.choices(plan)]
    parts = [
        table_html(("plan", ""), [[escape(name), escape(value)] for name, value in plan_tables.facts(plan)]),
        table_html(("", *plan_tables.settings_head(plan.unit)), settings),
        table_html(("a training step", "GiB"), [list(row) for row in plan_tables.memory(plan)]),
        table_html(("phase", "GiB", ""), [list(row) for row in plan_tables.phases(plan)]),
        *(f"<p><b>{escape(problem)}</b></p>" for problem in plan.problems),
        "<p>" + "<br>".join(map(escape, plan.notes)) + "</p>",
    ]
    return "".join(parts)


def _more(count: int, where: str) -> str:
    return f"<p>and {count - MOST_ROWS:,} more in {escape(where)}</p>" if count > MOST_ROWS else ""
