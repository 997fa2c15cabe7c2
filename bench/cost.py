"""What a million tokens cost in electricity, beside the price of a hosted guard model."""

from __future__ import annotations

from dataclasses import dataclass

from edgeguard.bench.cells import Cell

HOSTED = 0.20
"""USD per million tokens of the hosted Llama Guard."""
JOULES = 3.6e6  # of a kilowatt-hour


@dataclass(frozen=True)
class Power:
    """The assumptions."""

    watts: float = 65.0
    """Of the whole machine under load."""
    price: float = 0.30
    """USD per kilowatt-hour."""

    def per_million(self, seconds: float, tokens: float) -> float:
        """USD for a million tokens, when `tokens` take `seconds` and nothing else is paid for."""
        return seconds / tokens * 1e6 * self.watts / JOULES * self.price


def prompt_tokens(cell: Cell) -> float | None:
    """Tokens of the whole prompt, which a hosted model charges for; None where the cell does not say."""
    told = cell.extra.get("prompt_tokens", cell.params.get("prompt_tokens"))
    return float(told) if isinstance(told, (int, float)) and told > 0 else None
