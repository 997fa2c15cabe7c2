"""Charts as SVG: bars and lines whose width follows the page (positions in percent), so that text keeps its size on a phone.

Colours are classes of `chart.css`. Nothing is told by colour alone: bars carry their names and values, lines have marks.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from edgeguard.bench.markup import Markup, tag
from edgeguard.bench.result import figure

NARROW = (44, 50)
"""Characters that fit beside a value, and in a line below, on a narrow phone."""
TEXT, BAR, GAP, TICKS = 18, 14, 18, 22  # pixels
WIDE = 40
"""Largest by smallest value from which a bar chart is logarithmic."""
HEIGHT, LEFT, RIGHT = 300, 3.0, 95.0  # of a line chart: pixels, percent
SERIES = 6
_Place = Callable[[float], float]
MARKS = (
    "M0-4.5A4.5 4.5 0 1 1 0 4.5A4.5 4.5 0 1 1 0-4.5Z", "M-4-4H4V4H-4Z", "M0-5.5L5 4H-5Z", "M0-6L6 0L0 6L-6 0Z", "M0 5.5L5-4H-5Z",
    "M-5-2H-2V-5H2V-2H5V2H2V5H-2V2H-5Z",
)


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart."""

    label: str
    value: float | None
    """None for what was not measured."""
    shown: str
    """The value for people, or why there is none."""
    cell: str
    """Where it comes from."""
    ours: bool = False
    note: str = ""
    spread: tuple[float, float] | None = None
    """Quartiles, drawn as a thin line."""


@dataclass(frozen=True)
class Point:
    """One mark of a line."""

    x: float
    y: float
    late: float | None
    """95th percentile, drawn dashed."""
    cell: str


@dataclass(frozen=True)
class Series:
    """A line with its name; `number` decides colour and mark."""

    label: str
    number: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Axis:
    """From a value to percent of the width or height."""

    low: float
    high: float
    log: bool

    def at(self, value: float) -> float:
        """0 to 100."""
        if self.log:
            low, high, value = math.log10(self.low), math.log10(self.high), math.log10(max(value, self.low))
        else:
            low, high = self.low, self.high
        return 100 * min(max((value - low) / (high - low), 0), 1)

    @property
    def ticks(self) -> list[float]:
        """Powers of ten of a logarithmic axis; a linear one of bars needs none, they carry their values."""
        if not self.log:
            return []
        return [10.0 ** power for power in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]


def style() -> Markup:
    """The style sheet of all charts."""
    return Markup(files("edgeguard.bench").joinpath("chart.css").read_text("utf-8"))


def axis_of(values: Iterable[float], log: bool | None = None) -> Axis:
    """An axis that holds the values: from 0, or over whole powers of ten where they differ by more than WIDE times."""
    held = list(values)
    positive = [value for value in held if value > 0]
    if log is None:
        log = bool(positive) and len(positive) == len(held) and max(positive) > WIDE * min(positive)
    if not (log and positive):
        return Axis(0.0, max(positive, default=1.0), False)
    low = math.floor(math.log10(min(positive) * 0.8))
    return Axis(10.0 ** low, 10.0 ** max(math.ceil(math.log10(max(positive))), low + 1), True)


def bar_chart(name: str, title: str, desc: str, bars: Sequence[Bar], unit: str) -> Markup:
    """Bars below each other, name and value above each; `name` is unique in the page."""
    axis = axis_of(_values(bars))
    parts, y = _bars(bars, axis, unit, NARROW)
    return _svg(name, title, desc, parts, y)


def picture(title: str, desc: str, bars: Sequence[Bar], below: Sequence[str], unit: str, width: int = 720) -> Markup:
    """A bar chart as a file of its own, with its heading and lines of text below."""
    pad = 20
    parts, height = _bars(bars, axis_of(_values(bars), log=False), unit, (80, 95))
    lines = [piece for line in below for piece in _wrapped(line, 100)]
    total = pad + 34 + height + len(lines) * TEXT + pad
    inner = tag("svg", *parts, x=pad, y=pad + 34, width=width - 2 * pad, height=height)
    written = [tag("text", line, class_="note", x=pad, y=pad + 34 + height + TEXT * (index + 1) - 8) for index, line in enumerate(lines)]
    return tag(
        "svg", tag("title", title, id="title"), tag("desc", desc, id="desc"), tag("style", style()),
        tag("rect", width=width, height=total, rx=8, style="fill: var(--paper)"),
        tag("text", title, class_="head", x=pad, y=pad + 16), inner, written,
        xmlns=XMLNS, viewBox=f"0 0 {width} {total}", width=width, height=total, role="img", aria_labelledby="title desc",
    )


XMLNS = "http://www.w3.org/2000/svg"
"""A name, not an address that is asked for; SVG files need it."""


def line_chart(name: str, title: str, desc: str, series: Sequence[Series], unit: str, axes: tuple[Axis, Axis]) -> Markup:
    """Lines over two logarithmic axes: medians drawn through, 95th percentiles dashed."""
    across, up = axes

    def x(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * across.at(value) / 100

    def y(value: float) -> float:
        return HEIGHT - 30 - (HEIGHT - 50) * up.at(value) / 100

    parts: list[Markup] = []
    for tick in up.ticks:
        parts += [tag("line", class_="grid", x1="0", x2="100%", y1=f"{y(tick):.1f}", y2=f"{y(tick):.1f}"),
                  tag("text", _tick(tick, unit), class_="tick", x="0", y=f"{y(tick) - 4:.1f}")]
    for place in sorted({point.x for line in series for point in line.points}):
        parts.append(tag("text", f"{place:,.0f}", class_="tick mid", x=_percent(x(place)), y=HEIGHT - 8))
    for line in series:
        parts.append(_line(line, unit, x, y))
    return _svg(name, title, desc, parts, HEIGHT)


def mark(number: int) -> Markup:
    """A small sample of a series for a legend."""
    kind = number % SERIES
    return tag("svg", tag("line", class_=f"s{kind} stroke", x1=0, x2=28, y1=8, y2=8), _mark(kind, "14", "8"), width=28, height=16,
               aria_hidden="true")


def _line(line: Series, unit: str, x: _Place, y: _Place) -> Markup:
    kind, parts = line.number % SERIES, []
    for one, two in zip(line.points, line.points[1:], strict=False):
        ends = {"x1": _percent(x(one.x)), "x2": _percent(x(two.x))}
        parts.append(tag("line", class_="stroke", **ends, y1=f"{y(one.y):.1f}", y2=f"{y(two.y):.1f}"))
        if one.late is not None and two.late is not None:
            parts.append(tag("line", class_="late", **ends, y1=f"{y(one.late):.1f}", y2=f"{y(two.late):.1f}"))
    for point in line.points:
        told = f"{line.label}, {point.x:,.0f} tokens: {figure(point.y, unit)} ({point.cell})"
        parts.append(_mark(kind, _percent(x(point.x)), f"{y(point.y):.1f}", told))
    return tag("g", parts, class_=f"s{kind}")


def _mark(kind: int, x: str, y: str, told: str = "") -> Markup:
    """A mark that lies at a place in percent, which a path alone cannot."""
    parts = [*([tag("title", told)] if told else []), tag("path", class_=f"s{kind} mark", d=MARKS[kind])]
    return tag("svg", tag("g", parts), x=x, y=y, overflow="visible")


def _values(bars: Sequence[Bar]) -> list[float]:
    """Of all that is drawn: bars, and the ends of their spreads."""
    return [value for bar in bars if bar.value is not None for value in (bar.value, *(bar.spread or ()))]


def _bars(bars: Sequence[Bar], axis: Axis, unit: str, fit: tuple[int, int]) -> tuple[list[Markup], int]:
    """The rows, and their height."""
    rows, y = [], TICKS if axis.log else 0
    for bar in bars:
        row, height = _bar(bar, axis, y, fit)
        rows.append(row)
        y += height
    lines = [
        (tag("line", class_="grid", x1=_percent(axis.at(tick)), x2=_percent(axis.at(tick)), y1=TICKS - 6, y2=y),
         tag("text", _tick(tick, unit), class_=f"tick {_anchor(axis.at(tick))}", x=_percent(axis.at(tick)), y=12))
        for tick in axis.ticks
    ]
    return [*(part for line in lines for part in line), *rows], y


def _bar(bar: Bar, axis: Axis, y: int, fit: tuple[int, int]) -> tuple[Markup, int]:
    """Name and value, the bar, notes; each longer text in as many lines as it needs."""
    names = _wrapped(bar.label, fit[0] - (len(bar.shown) if bar.value is not None else 12)) or [""]
    value = bar.shown if bar.value is not None else "not measured"
    notes = _wrapped(bar.note if bar.value is not None else bar.shown, fit[1])
    parts = [tag("title", f"{bar.label}: {bar.shown} ({bar.cell})")]
    for line in names:
        y += TEXT
        parts.append(tag("text", line, class_="label", x="0", y=y - 5))
    parts.append(tag("text", value, class_="value end", x="100%", y=y - 5))
    box = {"x": "0", "y": y, "height": BAR, "rx": 3}
    if bar.value is None:
        parts.append(tag("rect", class_="missing", **box, width="100%"))
    else:
        parts += [tag("rect", class_="track", **box, width="100%"),
                  tag("rect", class_="ours" if bar.ours else "theirs", **box, width=_percent(max(axis.at(bar.value), 0.4)))]
        if bar.spread and bar.spread[0] < bar.spread[1]:
            low, high = map(axis.at, bar.spread)
            parts.append(tag("line", class_="spread", x1=_percent(low), x2=_percent(high), y1=y + BAR / 2, y2=y + BAR / 2))
    below = y + BAR
    for line in notes:
        below += TEXT - 1
        parts.append(tag("text", line, class_="note", x="0", y=below - 3))
    return tag("g", parts), TEXT * len(names) + BAR + (TEXT - 1) * len(notes) + GAP


def _svg(name: str, title: str, desc: str, parts: Iterable[Markup], height: int) -> Markup:
    return tag("svg", tag("title", title, id=f"{name}-title"), tag("desc", desc, id=f"{name}-desc"), parts, width="100%", height=height,
               role="img", aria_labelledby=f"{name}-title {name}-desc")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


def _tick(value: float, unit: str) -> str:
    """A power of ten: without digits that say nothing."""
    return figure(value, unit).replace(".00", "").replace(".0", "")


def _percent(value: float) -> str:
    return f"{value:.2f}%"


def _anchor(place: float) -> str:
    return "start" if place < 5 else "end" if place > 95 else "mid"
