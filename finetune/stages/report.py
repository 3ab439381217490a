"""One self-contained page about a run: pictures inside, curves as SVG, no script, nothing fetched.

Everything comes from what lies in the run folder (and the pictures that it names); what is missing is left out.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from finetune import curves
from finetune.config import Config
from finetune.display import adapter_rows, data_uri, duration, plural, run_rows, table_html
from finetune.progress import say
from finetune.records import (
    Adapter,
    CaptionSet,
    Dataset,
    Receipt,
    Report,
    Run,
    Sample,
    from_plain,
    hash_of,
    load_receipt,
    receipt_path,
    save_receipt,
    versions,
    write_atomically,
)

STAGE = "report"
PAGE = "report.html"
STAGES = ("caption", "dataset", "train", "export", "sample")
STYLE = Path(__file__).with_name("report.css")

# base64 adds a third: both budgets together stay under the 5 MB that mail and chat programs still take.
SAMPLE_BUDGET_BYTES, CAPTION_BUDGET_BYTES = 3_200_000, 1_000_000
SAMPLE_SIDES, CAPTION_SIDES = (512, 384, 256, 128), (176, 128, 96, 64)  # pixels; the first that fits the budget
MOST_PAIRS, MOST_CAPTIONS = 60, 60


@dataclass(frozen=True)
class _Found:
    """What the run folder holds. Receipts by stage; `settings` are the values of config.yaml."""

    folder: Path
    settings: dict[str, Any]
    settings_text: str
    receipts: dict[str, Receipt]
    curves: curves.Curves
    samples: list[Sample]

    def record(self, stage: str, kind: type[Any]) -> Any:
        """The stage's record, or None."""
        receipt = self.receipts.get(stage)
        return from_plain(kind, receipt.record) if receipt else None


def report(config: Config) -> Report:
    """Write `report.html` into the run folder, atomically. Raises RunError for a damaged receipt or a full disk."""
    start = time.monotonic()
    run_dir = Path(config.run_dir)
    found = _gather(run_dir)
    page = _page(found)
    write_atomically(run_dir / PAGE, page)
    record = Report(str(run_dir / PAGE))
    save_receipt(
        run_dir,
        STAGE,
        record,
        input_hash=hash_of({stage: receipt.input_hash for stage, receipt in found.receipts.items()}),
        seconds=time.monotonic() - start,
        figures={"bytes": len(page.encode()), "pairs": len(found.samples)},
    )
    say(f"{STAGE}: {record.file}")
    return record


def _gather(run_dir: Path) -> _Found:
    receipts = {stage: receipt for stage in STAGES if (receipt := load_receipt(run_dir, stage))}
    text = _text(run_dir / "config.yaml")
    lines = _text(run_dir / "samples" / "samples.jsonl").splitlines()
    samples = [from_plain(Sample, json.loads(line)) for line in lines]
    return _Found(run_dir, yaml.safe_load(text) or {}, text, receipts, curves.read(run_dir), samples)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _page(found: _Found) -> str:
    sections = [
        ("pictures", "Base against tuned", _pictures(found)),
        ("curves", "Curves", _curves(found)),
        ("captions", "Captions", _captions(found)),
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
        # Nothing may be fetched or run, whatever a caption says.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"{_head(found)}<nav>{links}</nav>\n<main>{body}</main>\n</body>\n</html>\n"
    )


def _head(found: _Found) -> str:
    run: Run | None = found.record("train", Run)
    model, lora = found.settings.get("model", {}), found.settings.get("lora", {})
    facts = []
    if model.get("base"):
        facts.append(f"LoRA rank {lora.get('rank', '?')} on {escape(str(model['base']))}")
    if run:
        trained = date.fromtimestamp(receipt_path(found.folder, "train").stat().st_mtime)
        facts.append(f"trained on {trained.day} {trained:%B %Y}")
    return (
        f'<header><p class="eyebrow">finetune report</p><h1>{escape(_name(found))}</h1>'
        f'<p class="facts">{" · ".join(facts)}</p><p class="verdict">{_verdict(found, run)}</p>{_tiles(run)}</header>\n'
    )


def _name(found: _Found) -> str:
    return str(found.settings.get("name") or found.folder.name)


def _verdict(found: _Found, run: Run | None) -> str:
    """What came of the run, in plain words."""
    if run is None:
        return "No run has finished in this folder yet."
    sentences = [
        f"In {plural(run.steps, 'step')} the training loss went from {run.first_loss:.4f} to {run.last_loss:.4f} "
        f"({_change(run.first_loss, run.last_loss)})."
    ]
    if run.first_validation is not None and run.best_validation is not None:
        dataset: Dataset | None = found.record("dataset", Dataset)
        where = "On held-out pictures" if dataset is None or dataset.validation else "On fixed noise"
        verb = "fell" if run.best_validation < run.first_validation else "rose"
        at = "" if run.best_step is None else f", best at step {run.best_step:,}"
        sentences.append(
            f"{where} the loss {verb} from {run.first_validation:.4f} to {run.best_validation:.4f} "
            f"({_change(run.first_validation, run.best_validation)}){at}."
        )
    sentences.append(
        f"Training took {duration(run.seconds)} at {run.images_per_s:.1f} images a second, "
        f"with at most {run.peak_gib:.2f} GiB of memory."
    )
    if run.skipped_steps:
        sentences.append(f"{plural(run.skipped_steps, 'step')} had a loss or gradient that was not finite: refused.")
    return " ".join(sentences)


def _change(first: float, last: float) -> str:
    return f"{100 * (last / first - 1):+.1f} %".replace("-", "−") if first else "from 0"


def _tiles(run: Run | None) -> str:
    if run is None:
        return ""
    tiles = [("loss", f"{run.last_loss:.3f}")]
    if run.best_validation is not None:
        tiles.append(("validation loss", f"{run.best_validation:.3f}"))
    tiles += [
        ("training time", duration(run.seconds)),
        ("images a second", f"{run.images_per_s:.1f}"),
        ("peak memory", f"{run.peak_gib:.2f} GiB"),
        ("trained parameters", f"{run.trainable / run.total:.1%}" if run.total else "–"),
    ]
    return (
        '<dl class="tiles">' + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles) + "</dl>"
    )


def _pictures(found: _Found) -> str:
    """Per prompt its pairs, base on the left."""
    folder, shown = found.folder / "samples", found.samples[:MOST_PAIRS]
    files = [folder / name for sample in shown for name in (sample.base_file, sample.file)]
    uris = _fitting(files, SAMPLE_SIDES, SAMPLE_BUDGET_BYTES)
    prompts = []
    for prompt in dict.fromkeys(sample.prompt for sample in shown):
        pairs = "".join(
            f'<figure class="pair">{_half("base", uris[folder / sample.base_file], sample)}'
            f"{_half('tuned', uris[folder / sample.file], sample)}<figcaption>seed {sample.seed}</figcaption></figure>"
            for sample in shown
            if sample.prompt == prompt
        )
        prompts.append(f'<article class="prompt"><h3>{escape(prompt)}</h3>{pairs}</article>')
    if not prompts:
        return ""
    return f'<p class="note">{_how_drawn(found)}</p><div class="prompts">{"".join(prompts)}</div>' + _more(
        len(found.samples) - len(shown), "pair", "the samples folder"
    )


def _half(kind: str, uri: str | None, sample: Sample) -> str:
    alt = escape(f"{kind}: {sample.prompt}, seed {sample.seed}", quote=True)
    picture = f'<img src="{uri}" alt="{alt}">' if uri else "<em>picture is gone</em>"
    return f'<div class="{kind}">{picture}<span>{kind}</span></div>'


def _how_drawn(found: _Found) -> str:
    """The drawing's settings, which the sample stage leaves in each PNG."""
    note = "The same prompt, seed and noise, without and with the adapter"
    try:
        with Image.open(found.folder / "samples" / found.samples[0].file) as picture:
            facts = {key: str(value) for key, value in picture.info.items()}
    except OSError:
        return note + "."
    if "steps" in facts and "guidance" in facts:
        note += f"; {escape(facts['steps'])} denoising steps, guidance {escape(facts['guidance'])}"
    adapter = facts.get("adapter", "")
    if adapter and not Path(adapter).resolve().is_relative_to(found.folder.resolve()):
        note += f". Drawn with another adapter than this run's: {escape(adapter)}"
    return note + "."


def _curves(found: _Found) -> str:
    run: Run | None = found.record("train", Run)
    drawn = [
        curves.loss(found.curves),
        curves.validation(found.curves, run.best_step if run else None),
        curves.validation_by_level(found.curves),
        curves.learning_rate(found.curves),
        curves.gradient_norm(found.curves),
        curves.speed(found.curves),
        curves.memory(found.curves),
    ]
    charts = "".join(f"<figure>{chart}</figure>" for chart in drawn if chart)
    return f'<div class="charts">{charts}</div>' if charts else ""


def _captions(found: _Found) -> str:
    captions: CaptionSet | None = found.record("caption", CaptionSet)
    if captions is None or not captions.items:
        return ""
    root, shown = Path(captions.folder), captions.items[:MOST_CAPTIONS]
    uris = _fitting([root / item.file for item in shown], CAPTION_SIDES, CAPTION_BUDGET_BYTES)
    cards = []
    for item in shown:
        uri = uris[root / item.file]
        picture = f'<img src="{uri}" alt="">' if uri else '<span class="gone">gone</span>'
        cards.append(
            f'<li>{picture}<div><p>{escape(item.text)}</p><p class="note"><span class="chip {escape(item.source)}">'
            f"{escape(item.source)}</span> {escape(item.file)}</p></div></li>"
        )
    generated = sum(item.source == "generated" for item in captions.items)
    note = (
        f"{plural(len(captions.items), 'picture')} from {escape(captions.folder)}; "
        f"{generated} captioned by the model, {len(captions.items) - generated} by the user."
    )
    return f'<p class="note">{note}</p><ul class="captions">{"".join(cards)}</ul>' + _more(
        len(captions.items) - len(shown), "caption", "metadata.jsonl of the picture folder"
    )


def _stages(found: _Found) -> str:
    """Seconds and figures by stage, and the training's own figures."""
    if not found.receipts:
        return ""
    longest = max(receipt.seconds for receipt in found.receipts.values()) or 1.0
    rows = [
        [
            stage,
            f'<span class="bar" style="width:{max(1.0, 100 * receipt.seconds / longest):.0f}%"></span>'
            f"{duration(receipt.seconds)}",
            " · ".join(f"{_words(name)} <b>{_figure(value)}</b>" for name, value in receipt.figures.items()),
        ]
        for stage, receipt in found.receipts.items()
    ]
    total = sum(receipt.seconds for receipt in found.receipts.values())
    run: Run | None = found.record("train", Run)
    details = f"<h3>Training</h3>{_wide(table_html(('', ''), run_rows(run)))}" if run else ""
    return (
        f'<p class="note">{duration(total)} in all, each stage as it last ran.</p>'
        f"{_wide(table_html(('stage', 'time', 'figures'), rows))}{details}"
    )


def _adapter(found: _Found) -> str:
    adapter: Adapter | None = found.record("export", Adapter)
    if adapter is None:
        return ""
    trigger = f" Put <b>{escape(adapter.trigger)}</b> into the prompt to call it up." if adapter.trigger else ""
    head = ("dialect", "file", "size", "relative difference to the trained module")
    return f'<p class="note">In {escape(adapter.folder)}.{trigger}</p>{_wide(table_html(head, adapter_rows(adapter)))}'


def _configuration(found: _Found) -> str:
    train = found.receipts.get("train")
    used = train.versions if train else versions()
    rows = [[escape(package), escape(number)] for package, number in used.items()]
    settings = (
        f"<details><summary>config.yaml, every value resolved</summary><pre>{escape(found.settings_text)}</pre></details>"
        if found.settings_text
        else ""
    )
    return settings + _wide(table_html(("package", "version"), rows))


def _fitting(files: Sequence[Path], sides: Sequence[int], budget_bytes: int) -> dict[Path, str | None]:
    """Every picture as a data URI, all of them at the largest of `sides` with which they fit the budget together."""
    uris: dict[Path, str | None] = {}
    for side in sides:
        uris = {file: data_uri(file, side) for file in files}
        if sum(len(uri) for uri in uris.values() if uri) <= budget_bytes:
            break
    return uris


def _words(name: str) -> str:
    return escape(name.replace("_per_s", " a second").replace("_gib", " GiB").replace("_", " "))


def _figure(value: float | int | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.4g}"
    return "–" if value is None else escape(f"{value:,}" if isinstance(value, int) else value)


def _wide(table: str) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    return f'<div class="wide">{table}</div>'


def _more(count: int, thing: str, where: str) -> str:
    return f'<p class="note">{plural(count, f"more {thing}")} in {where}.</p>' if count > 0 else ""
