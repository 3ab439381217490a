"""The sections of a run's report, each of them HTML, or empty where the run folder has nothing for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from finetune.reporting import curves
from finetune.reporting.facts import Fact, caption_counts, duration, plural, run_facts, text_set_facts
from finetune.reporting.tables import adapter_table, answers_table, facts_table, marked_html, plain_table, table_html
from finetune.reporting.thumbnails import fitting
from finetune.run.receipts import Receipt, receipt_path, versions
from finetune.run.records import (
    Adapter,
    Answer,
    CaptionSet,
    Dataset,
    Run,
    Sample,
    TextSet,
    by_prompt,
    from_plain,
)

# base64 adds a third and is counted in; with curves and text the page stays under the 5 MB that mail programs take.
SAMPLE_BUDGET_BYTES, CAPTION_BUDGET_BYTES = 3_300_000, 1_000_000
SAMPLE_SIDES, CAPTION_SIDES = (512, 384, 256, 128), (176, 128, 96, 64)  # pixels; the first that fits the budget
MOST_PAIRS, MOST_CAPTIONS = 60, 60
STYLE = Path(__file__).with_name("report.css")
# Nothing may be fetched or run, whatever a caption says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

R = TypeVar("R")


@dataclass(frozen=True)
class Found:
    """What a run folder holds: receipts by stage, the values of config.yaml and its text, curves, images or answers.

    drawn: with which settings these were made, as far as the sample stage left them.
    """

    folder: Path
    settings: dict[str, Any]
    settings_text: str
    receipts: dict[str, Receipt]
    curves: curves.Curves
    samples: list[Sample]
    answers: list[Answer]
    drawn: dict[str, Any]

    def record(self, stage: str, kind: type[R]) -> R | None:
        """The stage's record, or None if it never ran."""
        receipt = self.receipts.get(stage)
        return from_plain(kind, receipt.record) if receipt else None

    def dataset(self) -> Dataset | TextSet | None:
        """The data set's record, of images or of conversations."""
        receipt = self.receipts.get("dataset")
        kind: type[Dataset] | type[TextSet] = TextSet if receipt and "rows" in receipt.record else Dataset
        return self.record("dataset", kind)


def page(found: Found) -> str:
    """The whole page."""
    sections = [
        ("images", "Base against tuned", _images(found)),
        ("answers", "Base against tuned", _answers(found)),
        ("curves", "Curves", _curves(found)),
        ("captions", "Captions", _captions(found)),
        ("conversations", "Conversations", _conversations(found)),
        ("stages", "Stages", _stages(found)),
        ("adapter", "Adapter", _adapter(found)),
        ("configuration", "Configuration", _configuration(found)),
    ]
    there = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in there)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in there)
    title = escape(_name(found))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title} – finetune report</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"{_head(found)}<nav>{links}</nav>\n<main>{body}</main>\n</body>\n</html>\n"
    )


def _head(found: Found) -> str:
    run = found.record("train", Run)
    model, lora = found.settings.get("model", {}), found.settings.get("lora", {})
    facts = []
    if model.get("base"):
        facts.append(f"LoRA rank {lora.get('rank', '?')} on {escape(str(model['base']))}")
    if run:
        trained = date.fromtimestamp(receipt_path(found.folder, "train").stat().st_mtime)
        facts.append(f"trained on {trained.day} {trained:%B %Y}")
    return (
        f'<header><p class="eyebrow">finetune report</p><h1>{escape(_name(found))}</h1>'
        f'<p class="facts">{" · ".join(facts)}</p><p class="verdict">{_verdict(found, run)}</p>'
        f"{_tiles(found, run)}</header>\n"
    )


def _name(found: Found) -> str:
    return str(found.settings.get("name") or found.folder.name)


def _verdict(found: Found, run: Run | None) -> str:
    """What came of the run, in plain words."""
    if run is None:
        return "No run has finished in this folder yet."
    sentences = [f"In {plural(run.steps, 'step')} the training loss {_change(run.first_loss, run.last_loss)}."]
    if run.first_validation is not None and run.best_validation is not None:
        at = "" if run.best_step is None else f", best at step {run.best_step:,}"
        change = _change(run.first_validation, run.best_validation)
        sentences.append(f"{_validated_on(found.dataset())} the loss {change}{_perplexity(found, run)}{at}.")
    return " ".join(sentences)


def _validated_on(dataset: Dataset | TextSet | None) -> str:
    if dataset is None:
        return "On held-out examples"
    things = "conversations" if isinstance(dataset, TextSet) else "images"
    if dataset.validation:
        return f"On held-out {things}"
    return f"On training {things}" + ("" if isinstance(dataset, TextSet) else " with fixed noise")


def _perplexity(found: Found, run: Run) -> str:
    """At the start, and where the validation loss was best."""
    points = found.curves.get(curves.PERPLEXITY, [])
    best = dict(points).get(-1 if run.best_step is None else run.best_step)
    return "" if best is None else f" and the perplexity from {points[0][1]:,.2f} to {best:,.2f}"


def _change(first: float, last: float) -> str:
    """Such as "fell by 50.0 %"."""
    return f"{'fell' if last < first else 'rose'} {f'by {100 * abs(last / first - 1):.1f} %' if first else 'from 0'}"


def _tiles(found: Found, run: Run | None) -> str:
    """All figures of the training."""
    dataset = found.dataset()
    facts = run_facts(run, held_out=dataset is None or bool(dataset.validation)) if run else []
    cells = "".join(
        f"<div><dt>{fact.label}</dt><dd>{fact.value}</dd><dd>{fact.note}</dd></div>"
        for fact in (Fact(*map(escape, fact)) for fact in facts)
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def _images(found: Found) -> str:
    """Per prompt its pairs, base on the left."""
    folder, shown = found.folder / "samples", found.samples[:MOST_PAIRS]
    files = [folder / name for sample in shown for name in (sample.base_file, sample.file)]
    uris = fitting(files, SAMPLE_SIDES, SAMPLE_BUDGET_BYTES)

    def pair(sample: Sample) -> str:
        base, tuned = (uris[folder / name] for name in (sample.base_file, sample.file))
        halves = _half("base", base, sample) + _half("tuned", tuned, sample)
        return f'<figure class="pair">{halves}<figcaption>seed {sample.seed}</figcaption></figure>'

    by = {prompt: "".join(map(pair, samples)) for prompt, samples in by_prompt(shown).items()}
    return _prompts(by, _how(found), len(found.samples)) if by else ""


def _answers(found: Found) -> str:
    """Per prompt a table: the base's answers on the left."""
    by = {prompt: answers_table(items) for prompt, items in by_prompt(found.answers[:MOST_PAIRS]).items()}
    return _prompts(by, _how(found), len(found.answers)) if by else ""


def _prompts(by: Mapping[str, str], note: str, count: int) -> str:
    """What belongs to each prompt under its words."""
    articles = "".join(
        f'<article class="prompt"><h3>{escape(prompt)}</h3>{body}</article>' for prompt, body in by.items()
    )
    more = _more(count - MOST_PAIRS, "pair", "the samples folder")
    return f'<p class="note">{note}</p><div class="prompts">{articles}</div>{more}'


def _half(kind: str, uri: str | None, sample: Sample) -> str:
    alt = escape(f"{kind}: {sample.prompt}, seed {sample.seed}", quote=True)
    image = f'<img src="{uri}" alt="{alt}">' if uri else "<em>image is gone</em>"
    return f'<div class="{kind}">{image}<span>{kind}</span></div>'


def _how(found: Found) -> str:
    """The settings, as far as the sample stage left them beside the samples."""
    drawn, note = found.drawn, "The same prompt and random numbers, without and with the adapter"
    if {"steps", "guidance"} <= drawn.keys():
        note += f"; {drawn['steps']} denoising steps, guidance {drawn['guidance']}"
    if {"temperature", "max_new_tokens"} <= drawn.keys():
        how = f"temperature {drawn['temperature']:g}" if drawn["temperature"] else "greedy decoding"
        note += f"; {how}, at most {plural(drawn['max_new_tokens'], 'token')} per answer"
    adapter = str(drawn.get("adapter", ""))
    if adapter and not Path(adapter).resolve().is_relative_to(found.folder.resolve()):
        note += f". Made with another adapter than this run's: {adapter}"
    return escape(note) + "."


def _curves(found: Found) -> str:
    run = found.record("train", Run)
    best_step = run.best_step if run else None
    charts = "".join(f"<figure>{chart}</figure>" for chart in curves.charts(found.curves, best_step))
    if not charts:
        return ""
    return f'<p class="note">Hover over a curve for its figures.</p><div class="charts">{charts}</div>'


def _captions(found: Found) -> str:
    captions = found.record("caption", CaptionSet)
    if captions is None or not captions.items:
        return ""
    root, shown = Path(captions.folder), captions.items[:MOST_CAPTIONS]
    uris = fitting([root / item.file for item in shown], CAPTION_SIDES, CAPTION_BUDGET_BYTES)
    cards = []
    for item in shown:
        uri = uris[root / item.file]
        image = f'<img src="{uri}" alt="">' if uri else '<span class="gone">gone</span>'
        cards.append(
            f'<li>{image}<div><p>{escape(item.text)}</p><p class="note"><span class="chip {escape(item.source)}">'
            f"{escape(item.source)}</span> {escape(item.file)}</p></div></li>"
        )
    note = f"{escape(captions.folder)}: {caption_counts(captions)}."
    more = _more(len(captions.items) - len(shown), "caption", "metadata.jsonl of the image folder")
    return f'<p class="note">{note}</p><ul class="captions">{"".join(cards)}</ul>{more}'


def _conversations(found: Found) -> str:
    """The figures of the data set, and a row of it with its trained tokens highlighted."""
    texts = found.dataset()
    if not isinstance(texts, TextSet):
        return ""
    row = ""
    if texts.preview:
        row = (
            '<p class="note">One row as the model sees it. Only the <mark>highlighted</mark> tokens are trained; the '
            f"rest is what they follow from.</p>{marked_html(texts.preview)}"
        )
    return _wide(facts_table("data set", text_set_facts(texts))) + row


def _stages(found: Found) -> str:
    """Seconds and figures by stage; those of the training are on top of the page."""
    if not found.receipts:
        return ""
    longest = max(receipt.seconds for receipt in found.receipts.values()) or 1.0
    rows = []
    for stage, receipt in found.receipts.items():
        bar = f'<span class="bar" style="width:{100 * receipt.seconds / longest:.0f}%"></span>'
        rows.append([stage, duration(receipt.seconds) + bar, _figures(receipt.figures) if stage != "train" else ""])
    total = duration(sum(receipt.seconds for receipt in found.receipts.values()))
    table = _wide(table_html(("stage", "time", "figures"), rows))
    return f'<p class="note">{total} in all, each stage as it last ran.</p>{table}'


def _adapter(found: Found) -> str:
    adapter = found.record("export", Adapter)
    if adapter is None:
        return ""
    trigger = f" Put <b>{escape(adapter.trigger)}</b> into the prompt to use it." if adapter.trigger else ""
    return f'<p class="note">In {escape(adapter.folder)}.{trigger}</p>{_wide(adapter_table(adapter))}'


def _configuration(found: Found) -> str:
    train = found.receipts.get("train")
    used = train.versions if train else versions()
    settings = ""
    if found.settings_text:
        summary = "config.yaml, every value resolved"
        settings = f"<details><summary>{summary}</summary><pre>{escape(found.settings_text)}</pre></details>"
    return settings + _wide(plain_table(("package", "version"), list(used.items())))


def _figures(figures: Mapping[str, float | int | str | None]) -> str:
    """A stage's own figures in a line."""
    words = {name.replace("_per_s", " per second").replace("_", " "): value for name, value in figures.items()}
    return " · ".join(
        f"{escape(name)} <b>{escape(_figure(value))}</b>" for name, value in words.items() if value is not None
    )


def _figure(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _wide(table: str) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    return f'<div class="wide">{table}</div>'


def _more(count: int, thing: str, where: str) -> str:
    return f'<p class="note">{plural(count, f"more {thing}")} in {where}.</p>' if count > 0 else ""
