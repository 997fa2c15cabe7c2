"""The reliability diagram: the share of unsafe rows over the score, with the diagonal that a calibrated score follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from edgeguard.bench.markup import Markup, tag

SIDE, LEFT, TOP, BELOW = 260, 40, 24, 40  # pixels
SMALL, LARGE = 2.5, 9.0  # radius of a mark: its area follows the share of rows
KINDS = (("raw_score", "raw score", "s1", "4 4"), ("score", "score", "s0", None))
"""The raw score is drawn only where it is another one."""


def diagram(name: str, title: str, bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """A square for the rows of one group; `name` is unique in the page. The area of a mark follows its rows."""
    kinds = [kind for kind in KINDS if kind[0] == "score" or bins["raw_score"] != bins["score"]]
    told = "; ".join(f"{label}: " + ", ".join(f"{each['score']:.2f} is {each['unsafe']:.0%} unsafe of {each['rows']}" for each in bins[key])
                     for key, label, _, _ in kinds)
    drawn = [part for key, label, color, dashes in kinds for part in _line(label, color, dashes, bins[key])]
    heading = ", ".join(label + (", dashed" if dashes else "") for _, label, _, dashes in kinds)
    width, height = LEFT + SIDE + 14, TOP + SIDE + BELOW
    svg = tag(
        "svg", tag("title", f"Reliability, {title}", id=f"{name}-title"), tag("desc", told, id=f"{name}-desc"),
        tag("text", f"{title}: {heading}", class_="label", x=LEFT, y=14), _grid(), drawn,
        tag("text", "score", class_="tick end", x=LEFT + SIDE, y=height - 6),
        viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_labelledby=f"{name}-title {name}-desc",
    )
    return tag("figure", svg, class_="square")


def _grid() -> list[Markup]:
    parts = [tag("line", class_="grid", x1=_x(0), y1=_y(0), x2=_x(1), y2=_y(1))]
    for tick in (0.0, 0.5, 1.0):
        parts += [tag("line", class_="grid", x1=_x(0), y1=_y(tick), x2=_x(1), y2=_y(tick)),
                  tag("line", class_="grid", x1=_x(tick), y1=_y(0), x2=_x(tick), y2=_y(1)),
                  tag("text", f"{tick:.0%}", class_="tick end", x=LEFT - 6, y=_y(tick)),
                  tag("text", f"{tick:g}", class_="tick mid", x=_x(tick), y=TOP + SIDE + 16)]
    return parts


def _line(label: str, color: str, dashes: str | None, bins: Sequence[Mapping[str, Any]]) -> list[Markup]:
    rows = sum(each["rows"] for each in bins)
    places = [(_x(each["score"]), _y(each["unsafe"])) for each in bins]
    parts = [tag("line", class_="stroke", x1=one[0], y1=one[1], x2=two[0], y2=two[1], stroke_dasharray=dashes)
             for one, two in pairwise(places)]
    for (x, y), each in zip(places, bins, strict=True):
        radius = SMALL + (LARGE - SMALL) * (each["rows"] / rows) ** 0.5
        told = f"{label} {each['score']:.3f}: {each['unsafe']:.1%} unsafe of {each['rows']} rows"
        parts.append(tag("g", tag("title", told), tag("circle", class_="mark", cx=x, cy=y, r=f"{radius:.1f}")))
    return [tag("g", parts, class_=color)]


def _x(value: float) -> str:
    return f"{LEFT + SIDE * value:.1f}"


def _y(value: float) -> str:
    return f"{TOP + SIDE * (1 - value):.1f}"
