"""Markup that is escaped by construction: text becomes markup only through `tag`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# what XML does not allow in any form
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
VOID = ("br", "meta", "wbr", "rect", "line", "circle", "path", "polygon")


class Markup(str):
    """Text that is markup already; every other string is escaped when it is put into markup."""

    __slots__ = ()


Child = str | Iterable[str] | None


def escape(text: str) -> Markup:
    """Text as markup, in elements and attributes alike."""
    return Markup(html.escape(FORBIDDEN.sub("\ufffd", text)))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element. In names of attributes a final `_` is dropped and others are written `-`; those that are None are left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items() if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{joined(*children)}</{name}>")


def joined(*children: Child) -> Markup:
    """Children one after the other."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escape(child))
        elif child is not None:
            parts.append(joined(*child))
    return Markup("".join(parts))
