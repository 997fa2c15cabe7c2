"""The sections of the page, each from the whole result; a group of cells that the run does not have makes no section."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgeguard.bench.cells import Cell
from edgeguard.bench.charts import Axis, Point, Series, axis_of, bar_chart, line_chart, mark
from edgeguard.bench.cost import HOSTED, prompt_tokens
from edgeguard.bench.headline import headline_bars, headline_cells, usual_way
from edgeguard.bench.markup import Markup, tag
from edgeguard.bench.result import Result, agreement, figure, pairs, shown, size_or_words, spread, why_not, words
from edgeguard.bench.tables import anchor, cell_table, grouped, label, level, link, table, value_of

Parts = Sequence[Markup]
KEYS = ("start", "tokens", "answer")
"""What cells of one chart of speeds have in common."""
STATES = {True: ("✓ met", "good"), False: ("✗ not met", "bad"), None: ("? not measured", "open")}
TOLD = ("told beside", "soft")
"""Of a value that is no target of its own."""


def targets(result: Result) -> Parts:
    """What was wanted."""
    rows = []
    for target in result.targets:
        state, kind = TOLD if target.met is None and target.got is not None else STATES[target.met]
        got = "-" if target.got is None else f"{target.got:.4g}"
        sources: list[Markup | str] = [part for cell in target.cells for part in (link(cell), " ")]
        rows.append([target.what, tag("span", target.wanted, class_="one"), tag("b", got, title=", ".join(target.cells)),
                     tag("span", state, class_=f"state {kind}"), target.note, tag("span", sources)])
    return [table("Targets", ("what", "wanted", "got", "", "note", "from"), rows)] if rows else []


def fidelity_of(result: Result, cell: Cell) -> str:
    """Share of verdicts that are those of the most exact artifact, in words."""
    found = agreement(result.cells, cell)
    return "fidelity not measured" if found is None else f"{shown(found)} agree with {words(found.params.get('against'))} ({found.id})"


def ladder(result: Result) -> Parts:
    """Level by level."""
    first, steady = usual_way(result)
    return grouped(result, "ladder", KEYS, lambda cell: _beside(result, cell), {
        "times L0, first call": lambda cell: _times(first, cell), "times L0, steady": lambda cell: _times(steady, cell),
        "weights": lambda cell: value_of(cell.facts, "bytes"), "kernel": lambda cell: value_of(cell.facts, "kernel"),
    })


def _beside(result: Result, cell: Cell) -> str:
    size = cell.facts.get("bytes")
    return " · ".join([size_or_words("bytes", size) if size else "size not recorded", fidelity_of(result, cell)])


def _times(base: Cell | None, cell: Cell) -> str:
    """How many times as fast as the usual way, where the message is alike."""
    alike = base is not None and all(base.params.get(name) == cell.params.get(name) for name in ("tokens", "answer"))
    return f"{base.p50 / cell.p50:.2f}x" if alike and base and base.p50 and cell.p50 else "-"


def headline(result: Result) -> Parts:
    """The comparison that the project is about."""
    chosen = [cell for cell in headline_cells(result) if cell is not None]
    if len(chosen) < 2:
        return []
    rows = headline_bars(result)
    told = "; ".join(f"{bar.label}: {bar.shown}" for bar in rows)
    return [tag("figure", bar_chart("headline", "One verdict", told, rows, chosen[0].unit), class_="chart"),
            tag("p", "From ", [part for cell in chosen for part in (link(cell.id), " ")], class_="soft")]


def peers(result: Result) -> Parts:
    """Other programs on the same source weights."""
    return grouped(result, "peers", KEYS, lambda cell: _beside(result, cell), {
        "weights": lambda cell: value_of(cell.facts, "bytes"), "fidelity": lambda cell: fidelity_of(result, cell),
        "precision": lambda cell: value_of(cell.facts, "precision"),
    })


def lengths(result: Result) -> Parts:
    """Lines over the length of the text, one chart for each answer, all on one scale."""
    cells = result.group("length")
    measured = [cell for cell in cells if cell.measured and isinstance(cell.params.get("tokens"), (int, float))]
    if not measured:
        return [cell_table("Time to verdict", cells, {})] if cells else []
    names = list(dict.fromkeys(cell.contender for cell in measured))
    places = [float(cell.params["tokens"]) for cell in measured]
    across = Axis(min(places), max(places) if max(places) > min(places) else 2 * min(places), True)
    up = axis_of([value for cell in measured for value in (cell.p50 or 0.0, cell.p95 or 0.0)], log=True)
    made: list[Markup] = []
    for index, answer in enumerate(dict.fromkeys(words(cell.params.get("answer")) for cell in cells)):
        own = [cell for cell in cells if words(cell.params.get("answer")) == answer]
        series = [_series(name, number, [cell for cell in own if cell.contender == name]) for number, name in enumerate(names)]
        drawn = [each for each in series if each.points]
        desc = "; ".join(f"{label(cell, own)}: {shown(cell)}" for cell in own)
        chart = line_chart(f"length-{index}", f"Time to verdict by tokens of text, answer {answer}", desc, drawn, own[0].unit, (across, up))
        legend = tag("ul", [tag("li", mark(each.number), " ", each.label) for each in drawn], class_="legend")
        made.append(tag("div", tag("h3", f"Answer: {answer}"), tag("figure", chart, legend, class_="chart"),
                        cell_table(f"Time to verdict, answer {answer}", own, {}), class_="facet"))
    return made


def _series(name: str, number: int, cells: Sequence[Cell]) -> Series:
    points = [Point(float(cell.params["tokens"]), cell.p50, cell.p95, cell.id) for cell in cells if cell.p50 is not None]
    return Series(name, number, tuple(sorted(points, key=lambda point: point.x)))


def cold(result: Result) -> Parts:
    """From the start of a process to the first verdict."""
    return grouped(result, "cold", ("what",), extra={"more": lambda cell: pairs(cell.extra)})


def packed(result: Result) -> Parts:
    """Several messages in a pass."""
    return grouped(result, "packed", ("tokens", "answer"), extra={
        "messages per second": lambda cell: figure(1 / cell.p50) if cell.p50 else "-",
    })


def memory(result: Result) -> Parts:
    """What the process holds."""
    kinds = ("resident", "anonymous", "peak", "weights")
    return grouped(result, "memory", ("when", "what"), extra={
        kind: (lambda cell, kind=kind: value_of(cell.extra, kind)) for kind in kinds  # type: ignore[misc]
    })


def ceilings(result: Result) -> Parts:
    """What the machine can do at most, and how much of that was reached."""
    made = grouped(result, "ceiling", ("what",), extra={
        "tokens x in x out": lambda cell: words(cell.params.get("shape")),
        "kernel": lambda cell: value_of(cell.facts, "kernel"),
    })
    rows = [[f"{level(cell)} {cell.contender}".strip(), figure(cell.extra["gmacs"], "GMAC/s"), _share(cell, "int8"), _share(cell, "float"),
             link(cell.id)] for cell in result.cells if "gmacs" in cell.extra and made]
    reached = table("Reached of the ceilings", ("", "reached", "of the integer ceiling", "of the float ceiling", "cell"), rows)
    return [*made, reached] if rows else made


def _share(cell: Cell, kind: str) -> str:
    share = cell.extra.get(f"share_of_{kind}_ceiling")
    return "-" if share is None else figure(share, "share")


def fidelity(result: Result) -> Parts:
    """How far each artifact and peer is from the most exact artifact."""
    cells = result.group("fidelity")
    names = list(dict.fromkeys(name for cell in cells for name in cell.extra))
    columns: dict[str, Callable[[Cell], Markup]] = {
        name.replace("_", " "): (lambda cell, name=name: value_of(cell.extra, name)) for name in names  # type: ignore[misc]
    }
    return grouped(result, "fidelity", (), extra=columns)


def gpu(result: Result) -> Parts:
    """The checks on a GPU."""
    return grouped(result, "gpu", ("what", "answer"), lambda cell: words(cell.facts.get("device")),
                   {"more": lambda cell: pairs(cell.extra)})


def costs(result: Result) -> Parts:
    """Electricity for a million tokens, as the result holds it."""
    hosted = float(result.cost.get("hosted", HOSTED))
    rows: list[Sequence[str | Markup]] = []
    for cell in result.cells:
        usd = cell.extra.get("usd_per_million_tokens")
        if usd is not None and cell.group in ("ladder", "packed") and cell.params.get("start") != "cold":
            rows.append([label(cell, result.group(cell.group)), f"{prompt_tokens(cell) or 0:,.0f}", shown(cell),
                         tag("b", f"{usd:.4f} USD", title=cell.id), f"{usd / hosted:.3g} times", link(cell.id)])
    if not rows:
        return []
    told = (f"Assumed: {words(result.cost.get('watts'))} W for the whole machine while it works, {words(result.cost.get('price'))} USD per "
            "kilowatt-hour, nothing for the machine itself nor for idle time. Tokens are those of whole prompts, as a hosted model counts "
            f"them; it costs {hosted:.2f} USD per million.")
    headings = ("", "prompt tokens", "a message", "a million tokens", f"of {hosted:.2f} USD", "cell")
    return [tag("p", told), table("Cost per million tokens", headings, rows)]


def missing(result: Result) -> Parts:
    """What has no number, and why."""
    rows = [[link(cell.id), cell.contender, why_not(cell)] for cell in result.cells if not cell.measured]
    rows += [[target.what, "target", target.note or "no cell it is computed from was measured"]
             for target in result.targets if target.met is None]
    return [table("Not measured", ("what", "of", "why"), rows)] if rows else [tag("p", "Everything that was asked for was measured.")]


def ran(result: Result) -> Parts:
    """Versions and what each contender was granted; fallbacks first, since they change what a number means."""
    seen: dict[tuple[str, str], list[str]] = {}
    fallbacks = []
    for cell in result.cells:
        if cell.facts:
            seen.setdefault((cell.contender, pairs(cell.facts)), []).append(cell.id)
        if cell.facts.get("fallbacks"):
            fallbacks.append(tag("li", f"{cell.contender}: {words(cell.facts['fallbacks'])} ", link(cell.id)))
    warning = [tag("div", tag("b", "Fallbacks were taken:"), tag("ul", fallbacks), class_="loud")] if fallbacks else []
    rows = [[name, told, tag("span", link(ids[0]), f" and {len(ids) - 1} more" if len(ids) > 1 else None)]
            for (name, told), ids in seen.items()]
    packages = result.machine.get("packages")
    versions = [tag("p", "Packages: ", words(packages))] if packages else []
    return [*warning, *versions, table("What ran", ("contender", "granted", "cells"), rows)]


def all_cells(result: Result) -> Parts:
    """Every cell with all it holds, so that every number above can be traced."""
    rows = [tag("tr", tag("th", tag("code", cell.id), scope="row"), [tag("td", each) for each in _whole(cell)], id=anchor(cell.id))
            for cell in result.cells]
    headings = ("cell", "contender", "median", "quartiles", "95%", "n", "asked", "more")
    head = tag("thead", tag("tr", [tag("th", heading, scope="col") for heading in headings]))
    whole = tag("table", tag("caption", "All cells, in the units of the file"), head, tag("tbody", rows))
    return [tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label="All cells")]


def _whole(cell: Cell) -> list[str | Markup]:
    if not cell.measured:
        return [cell.contender, tag("span", "not measured", class_="open"), "-", "-", "0", pairs(cell.params), why_not(cell)]
    low, high = spread(cell)
    return [cell.contender, f"{exact(cell.p50)} {cell.unit}", f"{exact(low)} to {exact(high)}", exact(cell.p95),
            str(len(cell.samples)), pairs(cell.params), pairs(cell.extra)]


def exact(value: float | None) -> str:
    """A number as it can be looked up in the file: six significant digits."""
    return "-" if value is None else f"{value:.6g}"
