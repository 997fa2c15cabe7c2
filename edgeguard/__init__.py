"""On-device inference for Llama Guard 2: a conversation in, `safe` or `unsafe` with categories out."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeguard.aio import AsyncGuard
    from edgeguard.backends.base import Run
    from edgeguard.errors import EdgeGuardError
    from edgeguard.guard import Guard
    from edgeguard.policy import Policy
    from edgeguard.verdict import Category, Verdict

__version__ = "0.1.0"
__all__ = ["AsyncGuard", "Category", "EdgeGuardError", "Guard", "Policy", "Run", "Verdict"]

_HOMES = {
    "AsyncGuard": "aio", "Category": "verdict", "EdgeGuardError": "errors", "Guard": "guard", "Policy": "policy",
    "Run": "backends.base", "Verdict": "verdict",
}  # fmt: skip


def __getattr__(name: str) -> object:
    # on first use, so that the command line starts at once and can report a broken dependency with a status of its own
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
