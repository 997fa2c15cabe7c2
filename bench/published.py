"""Published figures of other guards on the public sets, to stand beside a result; data only, nothing of it was measured here.

They are the ones that this project's targets name, taken over as they stand there.
"""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """One guard on one set."""

    guard: str
    f1: float
    fpr: float


SOURCE = "As the project's targets name them, after their makers' publications; none was measured here, nor with this program."
FIGURES: dict[str, tuple[Figure, ...]] = {
    "xstest": (Figure("Llama Guard 1", 0.737, 0.079), Figure("Llama Guard 2", 0.884, 0.084), Figure("OpenAI moderation API", 0.576, 0.040)),
    "openai-moderation": (
        Figure("Llama Guard 1", 0.737, 0.079), Figure("Llama Guard 2", 0.807, 0.060), Figure("OpenAI moderation API", 0.788, 0.156),
    ),
}
"""By the name of the set."""
