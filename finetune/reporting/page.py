"""The sections of a run's report, each of them HTML, or empty where the run folder has nothing for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from finetune.reporting import curves
from finetune.reporting.facts import Fact, Table, duration, run_facts
from finetune.reporting.notebook import html
from finetune.reporting.tables import answers_table, by_prompt_html, more_html, table_html, table_of
from finetune.reporting.thumbnails import data_uri, fitting
from finetune.run import slow_steps
from finetune.run.progress import plural
from finetune.run.receipts import Receipt, receipt_path, record_of, versions
from finetune.run.records import Adapter, Answer, CaptionSet, Dataset, Run, Sample, TextSet

# base64 adds a third and is counted in; with thumbnails, curves and text the page stays under the 5 MB that mail
# programs take.
BUDGET_BYTES = 3_300_000
SIDES = (512, 384, 256, 128)  # pixels; the first that fits the budget
MOST_PAIRS = 60
REFERENCE_SIDE = 160  # pixels of an image of the data set beside them
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
        return record_of(receipt, kind, self.folder) if receipt else None

    def dataset(self) -> Dataset | TextSet | None:
        """The data set's record, of images or of conversations."""
        receipt = self.receipts.get("dataset")
        kind: type[Dataset] | type[TextSet] = TextSet if receipt and "rows" in receipt.record else Dataset
        return self.record("dataset", kind)


def page(found: Found) -> str:
    """The whole page."""
    sections = [
        ("warnings", "Warnings", _warnings(found)),
        ("images", "Base against tuned", _images(found)),
        ("answers", "Base against tuned", _answers(found)),
        ("curves", "Curves", _curves(found)),
        ("captions", "Captions", _record(found.record("caption", CaptionSet))),
        ("data", "Data set", _record(found.dataset())),
        ("stages", "Stages", _stages(found)),
        ("adapter", "Adapter", _record(found.record("export", Adapter))),
        ("configuration", "Configuration", _configuration(found)),
    ]
    return document(f"{escape(_name(found))} – finetune report", _head(found), sections)


def document(title: str, head: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A page that needs nothing else. All is HTML: title, header, and sections by id, heading and body; empty ones are
    left out."""
    there = [(name, heading, body) for name, heading, body in sections if body]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in there)
    main = "".join(f'<section id="{name}"><h2>{heading}</h2>{body}</section>' for name, heading, body in there)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"{head}<nav>{links}</nav>\n<main>{main}</main>\n</body>\n</html>\n"
    )


def _head(found: Found) -> str:
    run = found.record("train", Run)
    model, lora = found.settings.get("model", {}), found.settings.get("lora", {})
    facts = []
    if model.get("base"):
        facts.append(escape(f"LoRA rank {lora.get('rank', '?')} on {model['base']}"))
    if run:
        trained = date.fromtimestamp(receipt_path(found.folder, "train").stat().st_mtime)
        facts.append(f"trained on {trained.day} {trained:%B %Y}")
    return (
        f'<header><p class="eyebrow">finetune report</p><h1>{escape(_name(found))}</h1>'
        f'<p class="facts">{" · ".join(facts)}</p><p class="verdict">{_verdict(run)}</p>'
        f"{_tiles(found, run)}</header>\n"
    )


def _name(found: Found) -> str:
    return str(found.settings.get("name") or found.folder.name)


def _verdict(run: Run | None) -> str:
    """What came of the run, in a sentence."""
    if run is None:
        return "No run has finished in this folder yet."
    # The first step's loss is of a few examples at random noise levels: of the training losses no honest change can be
    # told after a few steps. Validation is on the same inputs each time.
    name, first, last = "validation", run.first_validation, run.best_validation
    if not first or last is None:
        name, first, last = "training", run.first_loss, run.last_loss
    if not first:
        return f"In {plural(run.steps, 'step')} no loss was measured."
    change = f"{'fell' if last < first else 'rose'} by {100 * abs(last / first - 1):.1f}\N{NO-BREAK SPACE}%"
    return f"In {plural(run.steps, 'step')} the {name} loss {change}."


def _tiles(found: Found, run: Run | None) -> str:
    """All figures of the training."""
    if run is None:
        return ""
    dataset, perplexity = found.dataset(), found.curves.get(curves.PERPLEXITY, [])
    facts = run_facts(run, dataset, found.settings)
    if best := dict(perplexity).get(-1 if run.best_step is None else run.best_step):
        facts.insert(2, Fact("perplexity", f"{perplexity[0][1]:,.2f} → {best:,.2f}", f"at step {run.best_step:,}"))
    cells = (
        f"<div><dt>{fact.label}</dt><dd>{fact.value}</dd><dd>{fact.note}</dd></div>"
        for fact in (Fact(*map(escape, fact)) for fact in facts)
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _warnings(found: Found) -> str:
    """What the stages warned of, each once."""
    lines = dict.fromkeys(line for receipt in found.receipts.values() for line in receipt.warnings)
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _images(found: Found) -> str:
    """Per prompt its pairs, base on the left."""
    folder, shown = found.folder / "samples", found.samples[:MOST_PAIRS]
    uris = fitting([folder / name for sample in shown for name in (sample.base_file, sample.file)], SIDES, BUDGET_BYTES)

    def pairs(samples: Sequence[Sample]) -> str:
        return "".join(
            f'<figure class="pair">{_half("base", uris[folder / sample.base_file], sample)}'
            f"{_half('tuned', uris[folder / sample.file], sample)}<figcaption>seed {sample.seed}</figcaption></figure>"
            for sample in samples
        )

    return _references(found) + _noted(found, by_prompt_html(shown, pairs), len(found.samples)) if shown else ""


def _references(found: Found) -> str:
    """Some of the images that the tuned ones should look like."""
    captions = found.record("caption", CaptionSet)
    uris = [data_uri(file, REFERENCE_SIDE) for file in captions.some()] if captions else []
    images = "".join(f'<img src="{uri}" alt="an image of the data set">' for uri in uris if uri)
    return f'<p class="note">Some images of the data set:</p><div class="row">{images}</div>' if images else ""


def _answers(found: Found) -> str:
    """Per prompt a table: the base's answers on the left."""
    return _noted(found, by_prompt_html(found.answers[:MOST_PAIRS], answers_table), len(found.answers))


def _noted(found: Found, samples: str, count: int) -> str:
    more = more_html(count, MOST_PAIRS, "the samples folder")
    return f'<p class="note">{_how(found)}</p>{samples}{more}' if samples else ""


def _half(kind: str, uri: str | None, sample: Sample) -> str:
    alt = escape(f"{kind}: {sample.prompt}, seed {sample.seed}", quote=True)
    image = f'<img src="{uri}" alt="{alt}">' if uri else "<em>image is gone</em>"
    return f'<div class="{kind}">{image}<span>{kind}</span></div>'


def _how(found: Found) -> str:
    """The settings, as far as the sample stage left them beside the samples."""
    drawn, note = found.drawn, "The same prompt and random numbers, without and with the adapter"
    if {"steps", "guidance"} <= drawn.keys():
        note += f"; {drawn['steps']} denoising steps, guidance {drawn['guidance']}"
    temperature, most = drawn.get("temperature"), drawn.get("max_new_tokens")
    if isinstance(temperature, int | float) and isinstance(most, int) and abs(temperature) < 1e6:
        how = f"temperature {temperature:g}" if temperature else "greedy decoding"
        note += f"; {how}, at most {plural(most, 'token')} per answer"
    adapter = str(drawn.get("adapter", ""))
    if adapter and not _is_own(found, adapter):
        note += f". Made with another adapter than this run's: {adapter}"
    return escape(note) + "."


def _is_own(found: Found, adapter: str) -> bool:
    """Whether an adapter that samples were drawn with is the run's: as the sample stage wrote it, below the folder that
    it wrote its own in, which earlier versions named with the run folder as it was called then."""
    receipt = found.receipts.get("sample")
    drew_into = str(receipt.record.get("folder", "")) if receipt else ""
    return Path(adapter).is_relative_to(Path(drew_into).parent if drew_into else found.folder)


def _curves(found: Found) -> str:
    run = found.record("train", Run)
    best_step = run.best_step if run else None
    charts = "".join(f"<figure>{chart}</figure>" for chart in curves.charts(found.curves, best_step))
    if not charts:
        return ""
    slow = "".join(f"<li>{escape(line)}</li>" for line in slow_steps.lines(found.curves))
    slow = f'<p class="note">Steps that took much longer than the others:</p><ul>{slow}</ul>' if slow else ""
    return f'<p class="note">Hover over a curve for its figures.</p><div class="charts">{charts}</div>{slow}'


def _record(record: CaptionSet | Dataset | TextSet | Adapter | None) -> str:
    """As a notebook shows it; wide tables scroll by themselves where the screen is narrow."""
    return "" if record is None else f'<div class="wide">{html(record)}</div>'


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
    table = table_html(("stage", "time", "figures"), rows)
    return f'<p class="note">{total} in all, each stage as it last ran.</p><div class="wide">{table}</div>'


def _configuration(found: Found) -> str:
    train = found.receipts.get("train")
    used = train.versions if train else versions()
    settings = ""
    if found.settings_text:
        summary = "config.yaml, every value resolved"
        settings = f"<details><summary>{summary}</summary><pre>{escape(found.settings_text)}</pre></details>"
    return settings + table_of(Table("package", ("version",), list(used.items())))


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
