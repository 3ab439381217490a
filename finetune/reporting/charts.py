"""Line charts as inline SVG: no script, no network, text and axes in the page's own colour (light and dark alike)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 460, 250  # units of the drawing; small, so that 11-unit text is still readable on a phone
LEFT, RIGHT, BOTTOM = 52, 14, 40  # margins around the plot; the top one grows with the legend
TITLE_LINE, LEGEND_LINE, LETTER = 24, 17, 6.1  # heights, and the mean width of a letter at size 11
MOST_POINTS = 400  # per line; more can't be told apart at this width
MOST_DOTS = 40  # points that get a dot and a tooltip of their own
OUTLIERS = 0.01  # share of a faint line's points at either end that may leave the frame: spikes don't flatten the rest
# Mid-tones with at least 3:1 contrast to white and to near-black. A page may set --tone-N itself.
TONES = ("currentColor", "#2f7de1", "#c2571a", "#0d9488", "#3b82c4", "#6366d9", "#9152c9", "#bb4593")


@dataclass(frozen=True)
class Line:
    """One curve. tone: index into TONES. faint: the background of another curve, thin and pale."""

    label: str
    points: Points
    tone: int = 1
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """A point that is pointed out."""

    x: float
    y: float
    label: str


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_label: str,
    x_label: str = "step",
    zero: bool = False,
    log: bool = False,
    mark: Mark | None = None,
) -> str:
    """An SVG of the lines that have points; empty if none has.

    zero: the vertical axis starts at 0. log: it is logarithmic; all values are above 0.
    """
    lines = [Line(line.label, _thinned(line.points), line.tone, line.faint) for line in lines if line.points]
    if not lines:
        return ""
    legend = _legend([line for line in lines if line.label]) if len(lines) > 1 else []
    frame = _Frame.around(lines, zero=zero, log=log, legend_rows=len(legend))
    body = [
        f'<text x="0" y="14" font-size="14" font-weight="600" fill="currentColor">{escape(title)}</text>',
        *[item for row in legend for item in row],
        *frame.axes(x_label, y_label),
        *[drawn for line in sorted(lines, key=lambda line: not line.faint) for drawn in _curve(line, frame)],
        *([] if mark is None else [_mark(mark, frame)]),
    ]
    described = escape(f"{title}: {y_label} against {x_label}", quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}" '
        f'style="width:100%;max-width:{2 * WIDTH}px;height:auto" font-size="11">{"".join(body)}</svg>'
    )


@dataclass(frozen=True)
class _Frame:
    """Where values lie in the drawing; ticks are the first and last values that fit."""

    x_ticks: list[float]
    y_ticks: list[float]
    x_range: tuple[float, float]
    top: float
    log: bool

    @staticmethod
    def around(lines: Sequence[Line], *, zero: bool, log: bool, legend_rows: int) -> "_Frame":
        steps = [x for line in lines for x, _ in line.points]
        values = [y for line in lines for y in _extent(line)]
        low, high = (0.0 if zero else min(values)), max(values)
        if high - low < 1e-9 * max(abs(high), abs(low)) or high == low:
            low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
        first, last = min(steps), max(steps)
        x_ticks = [tick for tick in _ticks(first, last, whole=True) if first <= tick <= last]
        top = TITLE_LINE + legend_rows * LEGEND_LINE + 10
        y_ticks = _powers(low, high) if log else _ticks(low, high)
        return _Frame(x_ticks, y_ticks, (first, last if last > first else first + 1), top, log)

    def x(self, value: float) -> float:
        first, last = self.x_range
        return LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - self.top)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        """Grid lines, tick labels and the names of both axes."""
        drawn, floor = [], HEIGHT - BOTTOM
        for tick, text in zip(self.y_ticks, _tick_texts(self.y_ticks), strict=True):
            y = self.y(tick)
            strength = 0.45 if tick == self.y_ticks[0] else 0.13
            drawn.append(
                f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity="{strength}"/>'
                f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end" {_PALE}>{text}</text>'
            )
        for tick, text in zip(self.x_ticks, _tick_texts(self.x_ticks), strict=True):
            x = self.x(tick)
            drawn.append(
                f'<path d="M{x:.1f} {floor}v4" stroke="currentColor" stroke-opacity="0.45"/>'
                f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle" {_PALE}>{text}</text>'
            )
        middle = (self.top + floor) / 2
        drawn.append(
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle" {_PALE}>'
            f'{escape(x_label)}</text><text transform="translate(10 {middle:.0f}) rotate(-90)" text-anchor="middle" '
            f"{_PALE}>{escape(y_label)}</text>"
        )
        return drawn


_PALE = 'fill="currentColor" fill-opacity="0.7"'


def _colour(tone: int) -> str:
    return f"var(--tone-{tone},{TONES[tone]})"


def _curve(line: Line, frame: _Frame) -> list[str]:
    corners = [(frame.x(x), frame.y(y)) for x, y in line.points]
    width, opacity = (1, 0.45) if line.faint else (2.2 if line.tone else 2.6, 1)
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
    stroke = (
        f'<path d="{path}" fill="none" style="stroke:{_colour(line.tone)}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}" stroke-linejoin="round" stroke-linecap="round"/>'
    )
    if line.faint:
        return [stroke]
    drawn = [stroke]
    few = len(corners) <= MOST_DOTS // 2
    every = -(-len(corners) // MOST_DOTS)
    for (x, y), (step, value) in list(zip(corners, line.points, strict=True))[::every]:
        name = f"{line.label}, " if line.label else ""
        drawn.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2.4 if few else 6}" style="fill:{_colour(line.tone)}" '
            f'fill-opacity="{1 if few else 0}"><title>{escape(name)}step {step:g}: {value:.4g}</title></circle>'
        )
    return drawn


def _mark(mark: Mark, frame: _Frame) -> str:
    x, y = frame.x(mark.x), frame.y(mark.y)
    room_left = x > WIDTH / 2  # the label goes where there is room, and below a curve's lowest point there mostly is
    below = y < HEIGHT - BOTTOM - 26
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="currentColor" stroke-width="1.6"/>'
        f'<text x="{x - 4 if room_left else x + 4:.1f}" y="{y + 20 if below else y - 12:.1f}" font-weight="600" '
        f'fill="currentColor" text-anchor="{"end" if room_left else "start"}">{escape(mark.label)}</text>'
    )


def _legend(lines: Sequence[Line]) -> list[list[str]]:
    """Swatches with names, in as many rows as they need."""
    rows: list[list[str]] = [[]]
    x = 0.0
    for line in lines:
        needed = 22 + len(line.label) * LETTER + 12
        if rows[-1] and x + needed > WIDTH:
            rows.append([])
            x = 0.0
        y = TITLE_LINE + len(rows) * LEGEND_LINE - 8
        rows[-1].append(
            f'<path d="M{x:.0f} {y}h16" style="stroke:{_colour(line.tone)}" stroke-width="{1.4 if line.faint else 3}" '
            f'stroke-opacity="{0.5 if line.faint else 1}"/>'
            f'<text x="{x + 21:.0f}" y="{y + 4}" {_PALE}>{escape(line.label)}</text>'
        )
        x += needed
    return rows


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


def _extent(line: Line) -> tuple[float, float]:
    """The values that have to be inside the frame."""
    values = sorted(y for _, y in line.points)
    cut = int(len(values) * OUTLIERS) if line.faint else 0
    return values[cut], values[-1 - cut]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to seven round values around low … high, a step of 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten around low … high."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    largest = max(abs(tick) for tick in ticks)
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    if 0 < largest < 0.01 or largest >= 1e5:  # more digits would run into the axis' name
        return [_scientific(tick) for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:,.{decimals}f}".replace("-", "−") for tick in ticks]


def _scientific(value: float) -> str:
    """2e-4 rather than 0.0002."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value / 10.0**exponent:.3g}e{exponent}".replace("-", "−")
