"""Tables and figures in words, as reports and notebooks show them."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from finetune.run.records import Adapter, Run


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. head: plain words; rows: HTML, already escaped."""
    if not rows:
        return ""
    titles = "".join(f'<th style="text-align:left">{escape(title)}</th>' for title in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left;vertical-align:top">{cell}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def run_rows(run: Run) -> list[list[str]]:
    """What a finished run measured: name, figure."""
    rows = [
        ["steps", f"{run.steps:,}"],
        [f"{run.unit} seen", f"{run.items:,}"],
        ["loss, first step → mean of the last 10 % of steps", f"{run.first_loss:.4f} → {run.last_loss:.4f}"],
    ]
    if run.first_validation is not None and run.best_validation is not None:
        at = "" if run.best_step is None else f" (step {run.best_step:,})"
        rows.append(["validation loss, first → best", f"{run.first_validation:.4f} → {run.best_validation:.4f}{at}"])
    share = run.trainable / run.total if run.total else 0.0
    rows += [
        ["training time", duration(run.seconds)],
        ["speed", f"{rate(run.items_per_s)} {run.unit}/s"],
        ["peak memory", f"{run.peak_gib:.2f} GiB"],
        *([["memory of training", run.memory_summary]] if run.memory_summary else []),
        ["batch", run.batch],
        ["trained parameters", f"{run.trainable:,} of {run.total:,} ({share:.2%})"],
    ]
    if run.oom_fallbacks:
        rows.append(["memory ran out; went on with", run.oom_fallbacks])
    if run.skipped_steps:
        rows.append(["refused steps", f"{run.skipped_steps:,} (loss or gradient not finite)"])
    return rows


def adapter_rows(adapter: Adapter) -> list[list[str]]:
    """Format, file, size, difference."""
    return [
        [
            escape(export_format),
            escape(name),
            file_size(Path(adapter.folder) / name),
            difference(export_format, adapter.differences),
        ]
        for export_format, name in adapter.files.items()
    ]


def difference(export_format: str, differences: Mapping[str, float]) -> str:
    """How far a handed-out file is from the trained model: relative, or in nats a token for a merged model."""
    if export_format not in differences:
        return "average of the weights"
    unit = " nats a token (KL)" if export_format == "merged" else ""
    return f"{differences[export_format]:.1e}{unit}" if differences[export_format] else "no difference"


def plural(count: int, thing: str) -> str:
    """ "1 image", "2 images"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def rate(per_s: float) -> str:
    """ "18.5", "7,120"."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.1f}"


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
