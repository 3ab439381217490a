"""The sections of a run's report, each of them HTML, or empty where the run folder has nothing for it."""

from dataclasses import dataclass
from datetime import date
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from finetune.reporting import curves
from finetune.reporting.tables import adapter_rows, duration, plural, rate, run_rows, table_html
from finetune.reporting.texts import answers_table, by_prompt, marked_html, text_set_rows
from finetune.reporting.thumbnails import fitting
from finetune.run.records import (
    Adapter,
    Answer,
    CaptionSet,
    Dataset,
    Receipt,
    Run,
    Sample,
    TextSet,
    from_plain,
    receipt_path,
    versions,
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

    drawn: how these were made, as far as samples.jsonl says.
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
        if receipt and "rows" in receipt.record:
            return self.record("dataset", TextSet)
        return self.record("dataset", Dataset)


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
    change = _change(run.first_loss, run.last_loss)
    went = f"{run.first_loss:.4f} at the first one to {run.last_loss:.4f}, the mean of the last 10 % ({change})"
    sentences = [f"In {plural(run.steps, 'step')} the training loss went from {went}."]
    if run.first_validation is not None and run.best_validation is not None:
        verb = "fell" if run.best_validation < run.first_validation else "rose"
        at = "" if run.best_step is None else f", best at step {run.best_step:,}"
        perplexity = _perplexity(found, run)
        and_perplexity = f" and the perplexity from {perplexity[0]} to {perplexity[1]}" if perplexity else ""
        sentences.append(
            f"{_validated_on(found.dataset())} the loss {verb} from {run.first_validation:.4f} to "
            f"{run.best_validation:.4f} ({_change(run.first_validation, run.best_validation)}){and_perplexity}{at}."
        )
    sentences.append(
        f"Training took {duration(run.seconds)} at {rate(run.items_per_s)} {run.unit} a second, "
        f"with at most {run.peak_gib:.2f} GiB of memory."
    )
    if run.oom_fallbacks:
        sentences.append(f"Memory ran out; the same steps went on with {run.oom_fallbacks}.")
    if run.skipped_steps:
        sentences.append(f"{plural(run.skipped_steps, 'step')} had a loss or gradient that was not finite: refused.")
    return " ".join(sentences)


def _validated_on(dataset: Dataset | TextSet | None) -> str:
    if dataset is None:
        return "On held-out examples"
    things = "conversations" if isinstance(dataset, TextSet) else "images"
    if dataset.validation:
        return f"On held-out {things}"
    return f"On training {things}" + ("" if isinstance(dataset, TextSet) else " with fixed noise")


def _perplexity(found: Found, run: Run) -> tuple[str, str] | None:
    """At the start, and where the validation loss was best."""
    points = found.curves.get(curves.PERPLEXITY, [])
    best = dict(points).get(-1 if run.best_step is None else run.best_step)
    return (f"{points[0][1]:,.2f}", f"{best:,.2f}") if best is not None else None


def _change(first: float, last: float) -> str:
    return f"{100 * (last / first - 1):+.1f} %".replace("-", "−") if first else "from 0"


def _tiles(found: Found, run: Run | None) -> str:
    if run is None:
        return ""
    tiles = [("loss, last 10 % of steps", f"{run.last_loss:.3f}")]
    if run.best_validation is not None:
        tiles.append(("validation loss", f"{run.best_validation:.3f}"))
    if perplexity := _perplexity(found, run):
        tiles.append(("perplexity", perplexity[1]))
    tiles += [
        ("training time", duration(run.seconds)),
        (f"{run.unit} a second", rate(run.items_per_s)),
        ("peak memory", f"{run.peak_gib:.2f} GiB"),
        ("trained parameters", f"{run.trainable / run.total:.1%}" if run.total else "–"),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _images(found: Found) -> str:
    """Per prompt its pairs, base on the left."""
    folder, shown = found.folder / "samples", found.samples[:MOST_PAIRS]
    files = [folder / name for sample in shown for name in (sample.base_file, sample.file)]
    uris = fitting(files, SAMPLE_SIDES, SAMPLE_BUDGET_BYTES)
    prompts = []
    for prompt, samples in by_prompt(shown).items():
        pairs = "".join(
            f'<figure class="pair">{_half("base", uris[folder / sample.base_file], sample)}'
            f"{_half('tuned', uris[folder / sample.file], sample)}<figcaption>seed {sample.seed}</figcaption></figure>"
            for sample in samples
        )
        prompts.append(f'<article class="prompt"><h3>{escape(prompt)}</h3>{pairs}</article>')
    if not prompts:
        return ""
    return f'<p class="note">{_how_drawn(found)}</p><div class="prompts">{"".join(prompts)}</div>' + _more(
        len(found.samples) - len(shown), "pair", "the samples folder"
    )


def _half(kind: str, uri: str | None, sample: Sample) -> str:
    alt = escape(f"{kind}: {sample.prompt}, seed {sample.seed}", quote=True)
    image = f'<img src="{uri}" alt="{alt}">' if uri else "<em>image is gone</em>"
    return f'<div class="{kind}">{image}<span>{kind}</span></div>'


def _how_drawn(found: Found) -> str:
    """The drawing's settings, which the sample stage leaves in each PNG."""
    note = "The same prompt, seed and noise, without and with the adapter"
    try:
        with Image.open(found.folder / "samples" / found.samples[0].file) as image:
            facts = {key: str(value) for key, value in image.info.items()}
    except OSError:
        return note + "."
    if "steps" in facts and "guidance" in facts:
        note += f"; {escape(facts['steps'])} denoising steps, guidance {escape(facts['guidance'])}"
    return f"{note}.{_other_adapter(found, facts.get('adapter', ''))}"


def _other_adapter(found: Found, adapter: str) -> str:
    if not adapter or Path(adapter).resolve().is_relative_to(found.folder.resolve()):
        return ""
    return f" Made with another adapter than this run's: {escape(adapter)}."


def _answers(found: Found) -> str:
    """Per prompt a table: the base's answers on the left."""
    shown = found.answers[:MOST_PAIRS]
    prompts = [
        f'<article class="prompt"><h3>{escape(prompt)}</h3>{answers_table(items)}</article>'
        for prompt, items in by_prompt(shown).items()
    ]
    if not prompts:
        return ""
    return f'<p class="note">{_how_written(found)}</p><div class="prompts">{"".join(prompts)}</div>' + _more(
        len(found.answers) - len(shown), "pair", "the samples folder"
    )


def _how_written(found: Found) -> str:
    """The settings, which the sample stage leaves beside each answer."""
    temperature, longest = (found.drawn.get(name) for name in ("temperature", "max_new_tokens"))
    note = "The same prompt, without and with the adapter"
    if temperature is not None and longest is not None:
        how = f"the same random numbers, temperature {temperature:g}" if temperature else "always the likeliest token"
        note += f"; {how}, at most {plural(longest, 'token')} an answer"
    return f"{note}.{_other_adapter(found, str(found.drawn.get('adapter', '')))}"


def _curves(found: Found) -> str:
    run = found.record("train", Run)
    best_step = run.best_step if run else None
    drawn = [
        curves.loss(found.curves),
        curves.validation(found.curves, best_step),
        curves.perplexity(found.curves, best_step),
        curves.validation_by_level(found.curves),
        curves.learning_rate(found.curves),
        curves.gradient_norm(found.curves),
        curves.speed(found.curves),
    ]
    charts = "".join(f"<figure>{chart}</figure>" for chart in drawn if chart)
    if not charts:
        return ""
    return f'<p class="note">Hover over a curve for its figures.</p><div class="charts">{charts}</div>'


def _captions(found: Found) -> str:
    captions = found.record("caption", CaptionSet)
    if captions is None or not captions.items:
        return ""
    root, shown = Path(captions.folder), captions.items[:MOST_CAPTIONS]
    uris = fitting([root / item.file for item in shown], CAPTION_SIDES, CAPTION_BUDGET_BYTES)
    gpus = []
    for item in shown:
        uri = uris[root / item.file]
        image = f'<img src="{uri}" alt="">' if uri else '<span class="gone">gone</span>'
        gpus.append(
            f'<li>{image}<div><p>{escape(item.text)}</p><p class="note"><span class="chip {escape(item.source)}">'
            f"{escape(item.source)}</span> {escape(item.file)}</p></div></li>"
        )
    generated = sum(item.source == "generated" for item in captions.items)
    note = (
        f"{plural(len(captions.items), 'image')} from {escape(captions.folder)}; "
        f"{generated} captioned by the model, {len(captions.items) - generated} by the user."
    )
    return f'<p class="note">{note}</p><ul class="captions">{"".join(gpus)}</ul>' + _more(
        len(captions.items) - len(shown), "caption", "metadata.jsonl of the image folder"
    )


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
    return _wide(table_html(("data set", ""), text_set_rows(texts))) + row


def _stages(found: Found) -> str:
    """Seconds and figures by stage, and the training's own figures."""
    if not found.receipts:
        return ""
    longest = max(receipt.seconds for receipt in found.receipts.values()) or 1.0
    rows = []
    for stage, receipt in found.receipts.items():
        bar = f'<span class="bar" style="width:{100 * receipt.seconds / longest:.0f}%"></span>'
        known = {_words(name): _figure(value) for name, value in receipt.figures.items() if value is not None}
        figures = " · ".join(f"{name} <b>{value}</b>" for name, value in known.items())
        rows.append([stage, duration(receipt.seconds) + bar, figures])
    total = sum(receipt.seconds for receipt in found.receipts.values())
    run = found.record("train", Run)
    measured = _wide(table_html(("training", ""), run_rows(run))) if run else ""
    memory = curves.memory(found.curves)
    return (
        f'<p class="note">{duration(total)} in all, each stage as it last ran.</p>'
        f"{_wide(table_html(('stage', 'time', 'figures'), rows))}"
        f'<div class="side">{measured}<figure>{memory}</figure></div>'
    )


def _adapter(found: Found) -> str:
    adapter = found.record("export", Adapter)
    if adapter is None:
        return ""
    trigger = f" Put <b>{escape(adapter.trigger)}</b> into the prompt to call it up." if adapter.trigger else ""
    head = ("format", "file", "size", "difference to the trained module")
    return f'<p class="note">In {escape(adapter.folder)}.{trigger}</p>{_wide(table_html(head, adapter_rows(adapter)))}'


def _configuration(found: Found) -> str:
    train = found.receipts.get("train")
    used = train.versions if train else versions()
    rows = [[escape(package), escape(number)] for package, number in used.items()]
    settings = ""
    if found.settings_text:
        summary = "config.yaml, every value resolved"
        settings = f"<details><summary>{summary}</summary><pre>{escape(found.settings_text)}</pre></details>"
    return settings + _wide(table_html(("package", "version"), rows))


def _words(name: str) -> str:
    return escape(name.replace("_per_s", " a second").replace("_gib", " GiB").replace("_", " "))


def _figure(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.4g}"
    return escape(f"{value:,}" if isinstance(value, int) else value)


def _wide(table: str) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    return f'<div class="wide">{table}</div>'


def _more(count: int, thing: str, where: str) -> str:
    return f'<p class="note">{plural(count, f"more {thing}")} in {where}.</p>' if count > 0 else ""
