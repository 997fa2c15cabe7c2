"""How much arithmetic a forward pass is: multiply-accumulates of its linear layers, from the model's shape alone."""

from __future__ import annotations

from collections.abc import Mapping

from edgeguard.architecture import Shape

COUNTS = {"q/o": 2, "k/v": 2, "gate/up": 2, "down": 1}
"""Kinds of matrices, and how many of each a layer has."""
Sizes = tuple[int, int]
"""Width in and width out, K and N."""


def linears(shape: Shape) -> dict[str, Sizes]:
    """The four kinds of matrices of a layer, by the names in `COUNTS`."""
    heads, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = ((shape.hidden, heads), (shape.hidden, keys), (shape.hidden, shape.ffn), (shape.ffn, shape.hidden))
    return dict(zip(COUNTS, sizes, strict=True))


def macs(shape: Shape, tokens: float, rows: float | None = None) -> dict[str, float]:
    """Multiply-accumulates of one pass over `tokens`, by kind of matrix.

    Attention, head, and the second terms in which an int8 graph reads near the input are left out: they are not counted as work done.

    With `rows` the last layer computes its keys and values for all tokens, and everything else for so many rows only.
    """
    last = tokens if rows is None else rows
    sizes = linears(shape)
    each = {name: inner * outer for name, (inner, outer) in sizes.items()}
    return {
        name: COUNTS[name] * each[name] * ((shape.layers - 1) * tokens + (tokens if name == "k/v" else last)) for name in COUNTS
    }


def fastest_seconds(work: Mapping[str, float], rates: Mapping[str, float]) -> float | None:
    """Seconds that the work takes at the rates (GMAC/s) of its kinds; None when a rate is not known."""
    if any(not rates.get(name) for name in work):
        return None
    return sum(amount / (rates[name] * 1e9) for name, amount in work.items())
