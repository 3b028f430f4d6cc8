"""Charts as SVG text, drawn by hand: axes, units, bands, and the values under the pointer. Colours come from the page's
style sheet through the class `tone-NAME`, so both themes share one drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Point = tuple[float, float]

TONES = tuple(f"part{place}" for place in range(1, 9))  # of lines in one chart that are alike


@dataclass(frozen=True)
class Series:
    """A line. band: (x, low, high), an interval around each point. style "faint" is raw data behind a smoothed line,
    "dots" has no line, "dashed" is a comparison."""

    label: str
    tone: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    style: str = "solid"


@dataclass(frozen=True)
class Axis:
    """How values read: label with its unit, format of one value, fixed bounds, logarithmic or not."""

    label: str
    show: Callable[[float], str]
    low: float | None = None
    high: float | None = None
    log: bool = False


def percent(value: float) -> str:
    """0.875 -> 88 %, 0.004 -> 0.4 %."""
    scaled = 100 * value
    digits = f"{scaled:.0f}" if scaled == 0 or abs(scaled) >= 1 else f"{scaled:.1g}"
    # the number and its sign stay on one line
    return f"{digits}\u00a0%"


def number(value: float) -> str:
    """Three digits; powers of ten for the very small and very large."""
    if value != 0 and value == 10.0 ** round(math.log10(abs(value))) and not 1e-3 <= abs(value) < 1e5:
        return f"10{_superscript(round(math.log10(abs(value))))}"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}×10{_superscript(int(exponent))}"
    return f"{value:.3g}"


def smooth(points: Sequence[Point]) -> list[Point]:
    """A running mean whose window is a twelfth of the curve, so every curve reads at the same size."""
    reach = max(1, len(points) // 24)
    values = [value for _, value in points]
    smoothed = []
    for index, (step, _) in enumerate(points):
        window = values[max(0, index - reach) : index + reach + 1]
        smoothed.append((step, sum(window) / len(window)))
    return smoothed


def line_chart(
    series: Sequence[Series],
    y: Axis,
    *,
    summary: str,
    x_label: str = "step",
    x_names: Sequence[str] = (),
    size: tuple[int, int] = (340, 210),
) -> str:
    """Lines over steps, or over named places if x_names is given (then x is an index into it).

    summary is what a screen reader says. Hovering a place shows every series' value there.
    """
    width, height = size
    tilt = bool(x_names) and (len(x_names) * 84 > width)
    left, right, top, bottom = 50, 14, 24, (88 if tilt else 40)
    xs = [x for line in series for x, _ in line.points]
    x_low, x_high = (-0.5, len(x_names) - 0.5) if x_names else (min(xs), max(xs))
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    scale = _Scale(y, series)

    def place_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def place_y(value: float) -> float:
        return height - bottom - scale.share(value) * (height - top - bottom)

    parts = [f'<text class="unit" x="{left - 42}" y="13">{escape(y.label)}</text>']
    for tick in scale.ticks:
        at = place_y(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 7}" y="{at + 3.5:.1f}" text-anchor="end">{y.show(tick)}</text>')
    base = height - bottom
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>')
    if x_names:
        for index, name in enumerate(x_names):
            at = place_x(index)
            turn = (
                f' transform="rotate(-38 {at:.1f} {base + 16})" text-anchor="end"' if tilt else ' text-anchor="middle"'
            )
            parts.append(f'<text class="tick name" x="{at:.1f}" y="{base + 16}"{turn}>{escape(name)}</text>')
    else:
        for tick in _ticks(x_low, x_high, 5):
            if tick == round(tick):
                parts.append(
                    f'<text class="tick" x="{place_x(tick):.1f}" y="{base + 16}" text-anchor="middle">{tick:.0f}</text>'
                )
        parts.append(
            f'<text class="unit" x="{width - right}" y="{height - 6}" text-anchor="end">{escape(x_label)}</text>'
        )
    for line in series:
        parts.append(_draw(line, place_x, place_y, categorical=bool(x_names)))
    parts.append(_hover(series, y, x_label, x_names, place_x, place_y, (left, width - right, top, base)))
    drawn = "".join(parts)
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(summary)}">{drawn}</svg>'


def sparkline(points: Sequence[Point], tone: str, summary: str) -> str:
    """A curve without axes, 120 × 28."""
    values = [value for _, value in points]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    last = max(len(points) - 1, 1)
    path = " ".join(f"{4 + 112 * n / last:.1f},{24 - 20 * (value - low) / span:.1f}" for n, value in enumerate(values))
    return (
        f'<svg class="spark" viewBox="0 0 120 28" role="img" aria-label="{escape(summary)}">'
        f'<polyline class="line tone-{tone}" points="{path}"/></svg>'
    )


def lanes(parents: Sequence[int | None], tones: Sequence[str], row: int = 46) -> tuple[str, int]:
    """The left margin of a history, newest at the bottom: a dot a row, a curve from each dot's parent.

    parents[i] is the row of i's parent (always an earlier one), or None. The child with the most descendants (the later
    one of two equals) continues its lane, the others branch off to the right. Returns the SVG and its width in pixels.
    """
    lane = _assign_lanes(parents)
    width = 26 * (max(lane, default=0) + 1) + 10

    def middle(index: int) -> tuple[float, float]:
        return 18 + 26 * lane[index], row * index + row / 2

    parts = []
    for index, parent in enumerate(parents):
        if parent is not None:
            (x1, y1), (x2, y2) = middle(parent), middle(index)
            bend = f"C{x1},{y1 + row * 0.9} {x2},{y1 + row * 0.1} {x2},{y1 + row}" if x1 != x2 else ""
            parts.append(f'<path class="edge tone-{tones[index]}" d="M{x1},{y1}{bend} L{x2},{y2}"/>')
    for index in range(len(parents)):
        x, at = middle(index)
        parts.append(f'<circle class="dot tone-{tones[index]}" cx="{x}" cy="{at}" r="6.5"/>')
    height = row * len(parents)
    return f'<svg width="{width}" height="{height}" aria-hidden="true">{"".join(parts)}</svg>', width


def _assign_lanes(parents: Sequence[int | None]) -> list[int]:
    count = len(parents)
    size = [1] * count
    for index in reversed(range(count)):
        parent = parents[index]
        if parent is not None:
            size[parent] += size[index]
    heir: dict[int, int] = {}
    for index, parent in enumerate(parents):
        if parent is not None and (parent not in heir or size[index] >= size[heir[parent]]):
            heir[parent] = index
    lane = [0] * count
    busy_until: list[int] = []
    for index, parent in enumerate(parents):
        if parent is not None and heir[parent] == index:
            lane[index] = lane[parent]
            continue
        # a lane is busy from the row it branches at to the last row of the line of heirs it carries
        end = index
        while end in heir:
            end = heir[end]
        start = index if parent is None else parent
        free = (number for number, until in enumerate(busy_until) if until < start)
        lane[index] = next(free, len(busy_until))
        if lane[index] == len(busy_until):
            busy_until.append(end)
        busy_until[lane[index]] = end
    return lane


class _Scale:
    """Maps a value to 0…1 of the axis and chooses its ticks."""

    def __init__(self, axis: Axis, series: Sequence[Series]) -> None:
        values = [value for line in series for _, value in line.points]
        values += [bound for line in series for _, low, high in line.band for bound in (low, high)]
        self._log = axis.log and min(values) > 0
        if self._log:
            first = math.floor(math.log10(min(values)) + 1e-9)
            last = max(math.ceil(math.log10(max(values)) - 1e-9), first + 1)
            self.low, self.high = 10.0**first, 10.0**last
            self.ticks = [10.0**power for power in range(first, last + 1)]
            return
        low = axis.low if axis.low is not None else min(values)
        high = axis.high if axis.high is not None else max(values)
        if low == high:
            low, high = low - 0.5, high + 0.5
        self.ticks = _ticks(low, high, 4)
        self.low = axis.low if axis.low is not None else min(low, self.ticks[0])
        self.high = axis.high if axis.high is not None else max(high, self.ticks[-1])

    def share(self, value: float) -> float:
        if self._log:
            span = math.log(self.high) - math.log(self.low)
            return (math.log(max(value, self.low)) - math.log(self.low)) / span
        return (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round values inside [low, high], 1, 2, 2.5 or 5 times a power of ten apart."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _draw(line: Series, place_x: Callable[[float], float], place_y: Callable[[float], float], categorical: bool) -> str:
    parts = []
    placed = [(place_x(x), place_y(value)) for x, value in line.points]
    if len(line.band) > 1:
        upper = [f"{place_x(x):.1f},{place_y(high):.1f}" for x, _, high in line.band]
        lower = [f"{place_x(x):.1f},{place_y(low):.1f}" for x, low, _ in reversed(line.band)]
        parts.append(f'<polygon class="band tone-{line.tone}" points="{" ".join(upper + lower)}"/>')
    for x, low, high in line.band:
        at = place_x(x)
        parts.append(
            f'<line class="whisker tone-{line.tone}" x1="{at:.1f}" x2="{at:.1f}" '
            f'y1="{place_y(low):.1f}" y2="{place_y(high):.1f}"/>'
        )
    if line.style != "dots" and len(placed) > 1:
        points = " ".join(f"{x:.1f},{at:.1f}" for x, at in placed)
        parts.append(f'<polyline class="line {line.style} tone-{line.tone}" points="{points}"/>')
    if categorical or line.style == "dots" or len(placed) == 1:
        hollow = " hollow" if line.style == "dots" else ""
        parts += [
            f'<circle class="mark{hollow} tone-{line.tone}" cx="{x:.1f}" cy="{at:.1f}" r="4"/>' for x, at in placed
        ]
    return "".join(parts)


def _hover(
    series: Sequence[Series],
    y: Axis,
    x_label: str,
    x_names: Sequence[str],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    frame: tuple[float, float, float, float],
) -> str:
    """Invisible columns; each shows its values while the pointer is over it."""
    left, right, top, base = frame
    # the smoothed line speaks for the raw one behind it
    spoken = [line for line in series if line.style != "faint"]
    places = sorted({x for line in spoken for x, _ in line.points})
    places = places[:: max(1, math.ceil(len(places) / 40))]
    centres = [place_x(x) for x in places]
    edges = [left, *((a + b) / 2 for a, b in pairwise(centres)), right]
    parts = []
    for x, centre, start, end in zip(places, centres, edges[:-1], edges[1:], strict=True):
        heading = x_names[int(x)] if x_names else f"{x_label} {x:g}"
        rows = [(line, value) for line in spoken if (value := dict(line.points).get(x)) is not None]
        texts = []
        for line, value in rows:
            around = next((f" ({y.show(low)} to {y.show(high)})" for at, low, high in line.band if at == x), "")
            texts.append(f"{line.label} {y.show(value)}{around}")
        wide = 6.1 * max(map(len, [heading, *texts])) + 24
        box = min(max(centre - wide / 2, left - 40), right - wide + 10)
        tall = 20 + 15 * len(texts)
        tip = f'<rect class="tip" x="{box:.0f}" y="{top - 20:.0f}" width="{wide:.0f}" height="{tall}" rx="6"/>'
        tip += f'<text class="tip-head" x="{box + 9:.0f}" y="{top - 5:.0f}">{escape(heading)}</text>'
        for row, ((line, _), text) in enumerate(zip(rows, texts, strict=True)):
            at = top + 10 + 15 * row
            tip += f'<circle class="mark tone-{line.tone}" cx="{box + 12:.0f}" cy="{at - 4:.0f}" r="3"/>'
            tip += f'<text class="tip-row" x="{box + 20:.0f}" y="{at:.0f}">{escape(text)}</text>'
        dots = "".join(
            f'<circle class="mark tone-{line.tone}" cx="{centre:.1f}" cy="{place_y(value):.1f}" r="4"/>'
            for line, value in rows
        )
        parts.append(
            f'<g class="place"><rect class="catch" x="{start:.1f}" y="{top}" width="{max(end - start, 1):.1f}" '
            f'height="{base - top:.1f}"/>'
            f'<g class="shown"><line class="rule" x1="{centre:.1f}" x2="{centre:.1f}" y1="{top}" y2="{base}"/>'
            f"{dots}{tip}</g></g>"
        )
    return "".join(parts)


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def legend(series: Sequence[Series]) -> str:
    """Which line is which, where there are several."""
    shown = [line for line in series if line.style != "faint"]
    if len(shown) < 2:
        return ""
    return '<div class="legend">' + "".join(
        f'<span><i class="key {line.style} tone-{line.tone}"></i>{escape(line.label)}</span>' for line in shown
    ) + "</div>"  # fmt: skip
