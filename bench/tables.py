"""Tables and bar charts of cells for the page; every row links to its cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgeguard.bench.cells import Cell
from edgeguard.bench.charts import Bar, bar_chart
from edgeguard.bench.markup import Child, Markup, escape, tag
from edgeguard.bench.result import Result, figure, ours, shown, size_or_words, spread, why_not, words

NAMED = {"tokens": "{} tokens of text", "answer": "answer {}", "pack": "{} in a pass", "prefix": "prefix {}"}
"""How params are told, where their name and value alone would not do."""
VALUES = {
    ("start", "cold"): "first call of a process", ("start", "steady"): "every further call", ("when", "load"): "at load",
    ("when", "steady"): "in steady state", ("when", "long"): "a long conversation", ("when", "disk"): "weights",
}
PER_SECOND = ("GMAC/s", "GB/s")
UNTOLD = ("level", "backend", "kind", "shape", "against", "precision")
"""Params that a label leaves out: others of the same cell say it already."""


def anchor(cell: str) -> str:
    """The id of a cell's row at the end of the page."""
    return f"cell-{cell}"


def link(cell: str) -> Markup:
    """A cell's id, leading to its row at the end of the page."""
    return tag("a", tag("code", cell), href=f"#{anchor(cell)}")


def table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[Child]]) -> Markup:
    """Names on the left, figures on the right; scrolls by itself where the page is narrow."""
    head = tag("thead", tag("tr", [tag("th", heading, scope="col") for heading in headings]))
    body = tag("tbody", [
        tag("tr", tag("th", row[0], scope="row"), [tag("td", "-" if cell is None else cell) for cell in row[1:]]) for row in rows
    ])
    whole = tag("table", tag("caption", caption), head, body)
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def label(cell: Cell, among: Sequence[Cell]) -> str:
    """The contender, on the ladder with its level, and those params that differ among the cells shown together."""
    differing = [name for name in cell.params if name not in UNTOLD and len({words(each.params.get(name)) for each in among}) > 1]
    told = [_param(name, cell.params[name]) for name in differing if not (level(cell) and (name, cell.params[name]) == ("pack", 1))]
    return ", ".join([f"{level(cell)} {cell.contender}".strip(), *told])


def level(cell: Cell) -> str:
    """`L0` to `L4` of what belongs to the ladder; else nothing."""
    return words(cell.params["level"]) if cell.params.get("level") else ""


def _param(name: str, value: object) -> str:
    if isinstance(value, str) and (name, value) in VALUES:
        return VALUES[name, value]
    told = NAMED.get(name) or ("{}" if isinstance(value, str) else f"{name.replace('_', ' ')} {{}}")
    return told.format(words(value))


def facets(cells: Sequence[Cell], keys: Sequence[str]) -> dict[tuple[str, ...], list[Cell]]:
    """Cells that may stand in one chart, alike in the params `keys` and of one rate; keyed by what they have in common."""
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        common = tuple(_param(key, cell.params[key]) for key in keys if cell.params.get(key) is not None)
        found.setdefault((*common, f"in {cell.unit}") if cell.unit in PER_SECOND else common, []).append(cell)
    return found


def bars(cells: Sequence[Cell], note: Callable[[Cell], str]) -> list[Bar]:
    """One for each cell."""
    return [
        Bar(label(cell, cells), cell.p50, shown(cell) if cell.measured else why_not(cell), cell.id, ours(cell), note(cell),
            spread(cell) if cell.measured else None)
        for cell in cells
    ]


def cell_table(caption: str, cells: Sequence[Cell], extra: Mapping[str, Callable[[Cell], Child]]) -> Markup:
    """Median, quartiles, 95th percentile, further columns, and the cell's id."""
    headings = ["", "median", "quartiles", "95%", "n", *extra, "cell"]
    rows = [[label(cell, cells), *_numbers(cell), *(column(cell) for column in extra.values()), link(cell.id)] for cell in cells]
    return table(caption, headings, rows)


def _numbers(cell: Cell) -> list[Child]:
    if not cell.measured:
        return [tag("span", "not measured", title=why_not(cell), class_="open"), "-", "-", "0"]
    low, high = spread(cell)
    return [tag("b", shown(cell), title=cell.id), tag("span", f"{figure(low, cell.unit)} to {figure(high, cell.unit)}", class_="one"),
            figure(cell.p95 or 0.0, cell.unit), str(len(cell.samples))]


def grouped(result: Result, group: str, keys: Sequence[str], note: Callable[[Cell], str] = lambda _: "",
            extra: Mapping[str, Callable[[Cell], Child]] | None = None) -> list[Markup]:
    """Charts and tables of one group of cells, one pair for each facet; the table says what the chart shows."""
    made: list[Markup] = []
    for index, (common, cells) in enumerate(facets(result.group(group), keys).items()):
        title = ", ".join(common)
        told = "; ".join(f"{label(cell, cells)}: {shown(cell)}" for cell in cells)
        chart = bar_chart(f"{group}-{index}", f"{group}: {title}" if title else group, told, bars(cells, note), cells[0].unit)
        heading = [tag("h3", title[0].upper() + title[1:])] if title else []
        figure_ = tag("figure", chart, class_="chart")
        made.append(tag("div", *heading, figure_, cell_table(title or group, cells, extra or {}), class_="facet"))
    return made


def value_of(values: Mapping[str, Any], name: str) -> Markup:
    """One of the facts or extras of a cell, or a dash."""
    told = size_or_words(name, values.get(name))
    return tag("span", told, class_="one") if len(told) < 24 else escape(told)
