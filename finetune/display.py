"""How records look in a notebook: thumbnails, tables and curves as HTML that is complete in itself.

The report is put together from the same pieces. Whatever lies in a picture folder may be damaged or gone by the time a
record is shown, so nothing here raises for a missing file.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from finetune import curves
from finetune.records import Adapter, CaptionSet, Dataset, Run, Samples

MOST_ROWS = 60  # captions shown; the rest is counted
THUMBNAIL = 96  # pixels
GRID_SIDE = 1600  # pixels: two prompts beside one another, four small pictures each
LOSSLESS_SIDE = 160  # pixels; up to here a PNG is small, and JPEG would show its blocks
JPEG_QUALITY = 86


def captions_html(captions: CaptionSet) -> str:
    """Thumbnails beside captions."""
    generated = sum(item.source == "generated" for item in captions.items)
    rows = [
        [picture_html(Path(captions.folder) / item.file, THUMBNAIL, item.file), *map(escape, (item.text, item.source))]
        for item in captions.items[:MOST_ROWS]
    ]
    parts = [f"<b>{plural(len(captions.items), 'picture')}</b> in {escape(captions.folder)}", f"{generated} captioned"]
    if captions.skipped:
        parts.append(f"{len(captions.skipped)} unreadable and left out")
    return f"<p>{', '.join(parts)}</p>{table_html(('', 'caption', 'from'), rows)}{_more(len(captions.items))}"


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


def run_html(run: Run) -> str:
    """The loss curve over a few figures."""
    drawn = curves.loss(curves.read(Path(run.folder)))
    chart = f'<div style="max-width:640px">{drawn}</div>' if drawn else ""
    return chart + table_html(("run", ""), run_rows(run))


def run_rows(run: Run) -> list[list[str]]:
    """What a finished run measured: name, figure."""
    rows = [
        ["steps", f"{run.steps:,}"],
        ["images seen", f"{run.images:,}"],
        ["loss, first step → smoothed at the end", f"{run.first_loss:.4f} → {run.last_loss:.4f}"],
    ]
    if run.first_validation is not None and run.best_validation is not None:
        at = "" if run.best_step is None else f" (step {run.best_step:,})"
        rows.append(["validation loss, first → best", f"{run.first_validation:.4f} → {run.best_validation:.4f}{at}"])
    share = run.trainable / run.total if run.total else 0.0
    rows += [
        ["training time", duration(run.seconds)],
        ["speed", f"{run.images_per_s:.1f} images/s"],
        ["peak memory", f"{run.peak_gib:.2f} GiB"],
        ["trained parameters", f"{run.trainable:,} of {run.total:,} ({share:.2%})"],
    ]
    if run.skipped_steps:
        rows.append(["refused steps", f"{run.skipped_steps:,} (loss or gradient not finite)"])
    return rows


def adapter_html(adapter: Adapter) -> str:
    """The exported files and how far each is from the trained module."""
    trigger = f", trigger phrase <b>{escape(adapter.trigger)}</b>" if adapter.trigger else ""
    head = f"<p><b>Adapter</b> for {escape(adapter.base)} in {escape(adapter.folder)}{trigger}</p>"
    return head + table_html(("dialect", "file", "size", "difference to the trained module"), adapter_rows(adapter))


def adapter_rows(adapter: Adapter) -> list[list[str]]:
    """Dialect, file, size, relative difference."""
    return [
        [
            escape(dialect),
            escape(name),
            file_size(Path(adapter.folder) / name),
            f"{adapter.differences[dialect]:.1e}" if dialect in adapter.differences else "average of the weights",
        ]
        for dialect, name in adapter.files.items()
    ]


def samples_html(samples: Samples) -> str:
    """The grid of base beside tuned."""
    return picture_html(Path(samples.grid), GRID_SIDE, "base beside tuned, a prompt at a time")


def picture_html(file: Path, side: int, described: str) -> str:
    """An <img> with the picture inside, or what is missing in words."""
    uri = data_uri(file, side)
    if uri is None:
        return f"<em>{escape(file.name)} can't be shown</em>"
    return f'<img src="{uri}" alt="{escape(described, quote=True)}" style="max-width:100%">'


def data_uri(file: Path, side: int) -> str | None:
    """The picture, upright and at most `side` pixels wide and high, as a data URI; None if it can't be read."""
    try:
        with Image.open(file) as opened:
            opened.draft("RGB", (side, side))  # JPEGs are decoded at a reduced size: ten times as fast
            picture = _on_white(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if max(picture.size) <= LOSSLESS_SIDE and side > THUMBNAIL:
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
    kind = "png" if stream.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _on_white(picture: Image.Image) -> Image.Image:
    """8-bit RGB: 16 bits scaled down, transparency on white."""
    if picture.mode.startswith("I"):
        picture = picture.convert("F").point(lambda value: value / 257).convert("L")  # 65535 / 255 = 257
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return picture.convert("RGB")
    seen = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. head: plain words; rows: HTML, already escaped."""
    if not rows:
        return ""
    titles = "".join(f'<th style="text-align:left">{escape(title)}</th>' for title in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def plural(count: int, thing: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """ "0.4 s", "42 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def file_size(path: Path) -> str:
    """Size of a file, or of everything in a folder."""
    files = [item for item in path.rglob("*") if item.is_file()] if path.is_dir() else [path]
    try:
        size = float(sum(file.stat().st_size for file in files))
    except OSError:
        return "gone"
    if not files:
        return "gone"
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _more(count: int) -> str:
    return f"<p>and {count - MOST_ROWS:,} more in metadata.jsonl</p>" if count > MOST_ROWS else ""
