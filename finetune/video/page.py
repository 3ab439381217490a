"""What a video's annotation looks like: a contact sheet, and a page with a timeline of what is seen when."""

import base64
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.reporting.charts import SHADES, tick_texts, ticks
from finetune.reporting.facts import duration
from finetune.reporting.page import document
from finetune.reporting.tables import table_html
from finetune.run.progress import plural
from finetune.video.records import Annotated

COLUMNS = 6
MOST_SHOWN = 60  # frames
GAP = 4
SHEET_QUALITY = 86
WIDTH, ROW, LEFT, RIGHT, FOOT = 900, 22, 110, 24, 26  # of the timeline, in units of its drawing
MOST_ROWS = 40
MOST_TICKS = 11

Row = dict[str, Any]
Span = tuple[float, float]


def sheet(thumbnails: Sequence[Path], target: Path) -> Path | None:
    """The thumbnails row by row in one image; None where there are none."""
    if not thumbnails:
        return None
    shown = thumbnails[:: -(-len(thumbnails) // MOST_SHOWN)]  # more where a file doesn't say how long it is
    with Image.open(shown[0]) as first:
        wide, high = first.size
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    whole = Image.new("RGB", (columns * (wide + GAP) - GAP, rows * (high + GAP) - GAP), "white")
    for number, path in enumerate(shown):
        with Image.open(path) as image:
            whole.paste(image, (number % columns * (wide + GAP), number // columns * (high + GAP)))
    whole.save(target, quality=SHEET_QUALITY)
    return target


def report(record: Annotated, rows: Sequence[Row], contact_sheet: Path | None) -> str:
    """The whole page, self-contained."""
    name = escape(Path(record.video).name)
    sections = [
        ("timeline", "What is seen when", timeline(record, rows)),
        ("found", "Tracks", _found(rows)),
        ("files", "Files", _files(record)),
    ]
    if contact_sheet is not None:
        encoded = base64.b64encode(contact_sheet.read_bytes()).decode()
        image = f'<img src="data:image/jpeg;base64,{encoded}" alt="frames with boxes" style="width:100%">'
        sections.insert(1, ("sheet", "Frames", image))
    head = (
        f'<header><p class="eyebrow">finetune annotate</p><h1>{name}</h1><p class="facts">{_facts(record)}</p>'
        f'<p class="verdict">{_verdict(record)}</p>'
        f'<dl class="tiles">{_tiles(record)}</dl></header>\n'
    )
    return document(f"{name} – annotated", head, sections)


def timeline(record: Annotated, rows: Sequence[Row]) -> str:
    """A row for each class, a bar for each stretch in which it is seen, a line at each cut, as inline SVG."""
    step = record.seconds / max(1, record.looks)
    by_class = spans(rows, step)
    if not by_class:
        return '<p class="note">No class is seen at any time.</p>'
    shown = sorted(by_class, key=lambda name: by_class[name][0])[:MOST_ROWS]
    floor = len(shown) * ROW
    seconds = max(record.seconds, step)

    def at(second: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, second / seconds)

    drawn = []
    for number, name in enumerate(shown):
        colour, top = SHADES[number % len(SHADES)], number * ROW
        drawn.append(f'<text x="{LEFT - 8}" y="{top + 15}" text-anchor="end" fill="currentColor">{escape(name)}</text>')
        for start, end in by_class[name]:
            words = escape(f"{name}, {start:.1f}–{end:.1f} s")
            drawn.append(
                f'<rect x="{at(start):.1f}" y="{top + 4}" width="{max(1.5, at(end) - at(start)):.1f}" '
                f'height="{ROW - 8}" rx="3" fill="{colour}"><title>{words}</title></rect>'
            )
    for cut in record.scenes[1:]:
        drawn.append(
            f'<path d="M{at(cut):.1f} 0V{floor}" stroke="currentColor" stroke-opacity="0.6" stroke-dasharray="3 3">'
            f"<title>cut at {cut:.1f} s</title></path>"
        )
    marks = [tick for tick in ticks(0, seconds) if tick <= seconds][:MOST_TICKS]
    for tick, text in zip(marks, tick_texts(marks), strict=True):
        drawn.append(f'<path d="M{at(tick):.1f} {floor}v5" stroke="currentColor" stroke-opacity="0.5"/>')
        drawn.append(
            f'<text x="{at(tick):.1f}" y="{floor + 18}" text-anchor="middle" fill="currentColor">{text} s</text>'
        )
    note = f'<p class="note">Dashed: {plural(len(record.scenes) - 1, "cut")}. Hover over a bar for its times.</p>'
    return (
        f'{note}<svg viewBox="0 0 {WIDTH} {floor + FOOT}" role="img" aria-label="classes over time" '
        f'style="width:100%;height:auto" font-size="12">{"".join(drawn)}</svg>'
    )


def spans(rows: Sequence[Row], step: float) -> dict[str, list[Span]]:
    """By class the stretches, in seconds, in which at least one object of it is seen. step: between two looks."""
    found: dict[str, list[Span]] = defaultdict(list)
    for row in rows:
        start = row["timestamp_sec"]
        for name in {one["class"] for one in row["objects"]}:
            stretches = found[name]
            if stretches and math.isclose(stretches[-1][1], start, abs_tol=step / 2):
                stretches[-1] = (stretches[-1][0], start + step)
            else:
                stretches.append((start, start + step))
    return dict(found)


def _facts(record: Annotated) -> str:
    return escape(f"{record.width}×{record.height} · {record.model} · score {record.threshold:g} or more")


def _verdict(record: Annotated) -> str:
    """What was found, in a sentence."""
    damage = f" The file is damaged: {record.damage}." if record.damage else ""
    return escape(f"Found: {record.found}.{damage}")


def _tiles(record: Annotated) -> str:
    together, _, stages = record.speed.partition("; ")
    facts: Mapping[str, tuple[str, str]] = {
        "video": (
            duration(record.seconds),
            f"{plural(record.frames, 'frame')}, {plural(len(record.scenes), 'scene')}",
        ),
        "looked at": (plural(record.looks, "look"), f"{record.looks / max(record.seconds, 1e-9):.3g} per second"),
        "found": (plural(sum(record.counts.values()), "track"), f"{record.objects:,} boxes"),
        "speed": (together, stages),
    }
    return "".join(
        f"<div><dt>{label}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"
        for label, (value, note) in facts.items()
    )


def _files(record: Annotated) -> str:
    """Links, which work as long as the page lies beside them."""
    links = (f'<a href="{name}">{name}</a>' for name in record.files)
    return f"<p>{' · '.join(links)}</p>"


def _found(rows: Sequence[Row]) -> str:
    """A table of all tracks."""
    tracks: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
    for row in rows:
        for one in row["objects"]:
            tracks[one["track"]].append((row["timestamp_sec"], one["score"], one["class"]))
    if not tracks:
        return '<p class="note">None.</p>'
    lines = [
        (
            str(number),
            escape(seen[0][2]),
            f"{seen[0][0]:.1f}–{seen[-1][0]:.1f} s",
            str(len(seen)),
            f"{sum(score for _, score, _ in seen) / len(seen):.2f}",
        )
        for number, seen in sorted(tracks.items())
    ]
    return f'<div class="wide">{table_html(("track", "class", "seen", "looks", "mean score"), lines)}</div>'
