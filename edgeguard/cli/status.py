"""Exit statuses; nothing else may be taken for a verdict."""

SAFE = 0
"""Judged safe, or whatever else was asked for is done."""
UNSAFE = 1
"""Judged unsafe; no other command ends with it."""
ERROR = 2
"""Everything that went wrong: nothing was judged."""
