"""Line charts as inline SVG: no script, no network, text and axes in the page's own colour (light and dark alike)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 460, 226  # units of the drawing; small, so that 11-unit text is still readable on a phone
LEFT, RIGHT, TOP, FLOOR = 52, WIDTH - 14, 10, HEIGHT - 40  # the plot's edges
MOST_POINTS = 400  # per line; more can't be told apart at this width
MOST_DOTS = 40  # points that get a dot and a tooltip of their own
OUTLIERS = 0.01  # share of a faint line's points at either end that may leave the frame: spikes don't flatten the rest
# Mid-tones with at least 3:1 contrast to white and to near-black.
BLUE, ORANGE = "#2f7de1", "#c2571a"
SHADES = ("#0d9488", "#3b82c4", "#6366d9", "#9152c9", "#bb4593")  # in this order, for what is in an order itself
BOLD, PALE = 'fill="currentColor" font-weight="600"', 'fill="currentColor" fill-opacity="0.7"'


@dataclass(frozen=True)
class Line:
    """One curve. faint: the background of another curve, thin and pale."""

    label: str
    points: Points
    colour: str = BLUE
    faint: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_label: str,
    zero: bool = False,
    log: bool = False,
    mark: tuple[float, float, str] | None = None,
) -> str:
    """Title, an SVG of the lines that have points, values over steps, and a legend; empty if none has.

    zero: the vertical axis starts at 0. log: it is logarithmic; all values are above 0. mark: step, value and words of
    a point that is pointed out.
    """
    lines = [replace(line, points=_thinned(line.points)) for line in lines if line.points]
    if not lines:
        return ""
    x, y = _x_axis(lines), _y_axis(lines, zero=zero, log=log)
    curves = [_curve(line, x, y) for line in sorted(lines, key=lambda line: not line.faint)]
    body = _grid(x, y, y_label) + "".join(curves) + (_mark(x.at(mark[0]), y.at(mark[1]), mark[2]) if mark else "")
    described = escape(f"{title}: {y_label} against step", quote=True)
    return (
        f'<div class="chart" style="max-width:{2 * WIDTH}px"><b>{escape(title)}</b>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}" style="width:100%;height:auto" '
        f'font-size="11">{body}</svg>{_legend(lines) if len(lines) > 1 else ""}</div>'
    )


@dataclass(frozen=True)
class _Axis:
    """Values `low` … `high` from `start` to `end` in the drawing."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies; what is outside lies at the edge."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + min(1.0, max(0.0, (value - low) / (high - low))) * (self.end - self.start)


def _x_axis(lines: Sequence[Line]) -> _Axis:
    steps = [x for line in lines for x, _ in line.points]
    first, last = min(steps), max(steps)
    inside = [tick for tick in ticks(first, last, whole=True) if first <= tick <= last]
    return _Axis(first, last if last > first else first + 1, LEFT, RIGHT, inside)


def _y_axis(lines: Sequence[Line], *, zero: bool, log: bool) -> _Axis:
    values = [y for line in lines for y in _extent(line)]
    low, high = (0.0 if zero else min(values)), max(values)
    if high - low < 1e-9 * max(abs(high), abs(low)) or high == low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    powers = ticks(math.log10(low), math.log10(high), whole=True) if log else []
    around = [10.0**power for power in powers] or ticks(low, high)
    return _Axis(around[0], around[-1], FLOOR, TOP, around, log)


def _extent(line: Line) -> tuple[float, float]:
    """The values that have to be inside the frame."""
    values = sorted(y for _, y in line.points)
    cut = int(len(values) * OUTLIERS) if line.faint else 0
    return values[cut], values[-1 - cut]


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to seven round values around low … high, a step of 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """As many decimals as the step between ticks asks for; very large and very small ones such as 2e−4."""
    largest = max(abs(value) for value in values)
    if 0 < largest < 0.01 or largest >= 1e5:  # more digits would run into the axis' name
        texts = [_scientific(value) for value in values]
    else:
        step = abs(values[1] - values[0]) if len(values) > 1 else 1.0
        texts = [f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" for value in values]
    return [text.replace("-", "−") for text in texts]


def _scientific(value: float) -> str:
    exponent = math.floor(math.log10(abs(value)) + 1e-9) if value else 0
    return f"{value / 10.0**exponent:.3g}e{exponent}" if value else "0"


def _grid(x: _Axis, y: _Axis, y_label: str) -> str:
    """Grid lines, tick labels and the names of both axes."""
    turned = f'{PALE} transform="translate(10 {(TOP + FLOOR) / 2:.0f}) rotate(-90)"'
    drawn = [_text((LEFT + RIGHT) / 2, HEIGHT - 6, "step", PALE, "middle"), _text(0, 0, y_label, turned, "middle")]
    for tick, text in zip(y.ticks, tick_texts(y.ticks), strict=True):
        strength, height = 0.45 if tick == y.low else 0.13, y.at(tick)
        drawn.append(f'<path d="M{LEFT} {height:.1f}H{RIGHT}" stroke="currentColor" stroke-opacity="{strength}"/>')
        drawn.append(_text(LEFT - 7, height + 4, text, PALE, "end"))
    for tick, text in zip(x.ticks, tick_texts(x.ticks), strict=True):
        drawn.append(f'<path d="M{x.at(tick):.1f} {FLOOR}v4" stroke="currentColor" stroke-opacity="0.45"/>')
        drawn.append(_text(x.at(tick), FLOOR + 16, text, PALE, "middle"))
    return "".join(drawn)


def _curve(line: Line, x: _Axis, y: _Axis) -> str:
    """The line, and dots with tooltips: visible where they are few, else only found by the mouse."""
    corners = [(x.at(step), y.at(value)) for step, value in line.points]
    width, opacity = (1, 0.45) if line.faint else (2.2, 1)
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in corners)
    drawn = (
        f'<path d="{path}" fill="none" stroke="{line.colour}" stroke-width="{width}" stroke-opacity="{opacity}" '
        'stroke-linejoin="round" stroke-linecap="round"/>'
    )
    few = len(corners) <= MOST_DOTS // 2
    every = -(-len(corners) // MOST_DOTS)
    dots = [] if line.faint else list(zip(corners, line.points, strict=True))[::every]
    for (a, b), (step, value) in dots:
        words = escape(f"{line.label}, step {step:g}: {value:.4g}".removeprefix(", "))
        drawn += (
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{2.4 if few else 6}" fill="{line.colour}" '
            f'fill-opacity="{1 if few else 0}"><title>{words}</title></circle>'
        )
    return drawn


def _mark(x: float, y: float, words: str) -> str:
    # The label goes where there is room, and below a curve's lowest point there mostly is.
    aside, anchor = (-4, "end") if x > WIDTH / 2 else (4, "start")
    label = _text(x + aside, y + 20 if y < FLOOR - 26 else y - 12, words, BOLD, anchor)
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="currentColor" stroke-width="1.6"/>{label}'


def _legend(lines: Sequence[Line]) -> str:
    names = (
        f'<span style="color:{line.colour};opacity:{0.5 if line.faint else 1}">━</span> {escape(line.label)}'
        for line in lines
    )
    return f'<div style="font-size:0.8em">{" &#160; ".join(names)}</div>'


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(text)}</text>'


def _thinned(points: Points) -> Points:
    """At most MOST_POINTS points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = len(points) / (MOST_POINTS // 2)
    kept: list[tuple[float, float]] = []
    for index in range(MOST_POINTS // 2):
        part = points[int(index * size) : int((index + 1) * size)]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept
