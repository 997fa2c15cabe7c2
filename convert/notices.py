"""Licence duties of converted weights: what is copied, what is written, and what the user is told."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

COPIED = re.compile(r"(LICEN[SC]E|USE_POLICY)[\w.+-]*", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """What the licence of a family of weights asks of whoever passes them on."""

    name: str
    attribution: str
    """The sentence that has to stand in NOTICE."""
    built_with: str
    """To be told beside a product, or empty."""
    prefix: str
    """How the name of a derived model has to begin, or empty."""
    url: str


def _llama(version: str, built_with: str, prefix: str) -> Licence:
    called = f"{'Meta ' if version == '3' else ''}Llama {version}"
    return Licence(
        f"{called} Community License",
        f"{called} is licensed under the {called} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
        built_with, prefix, f"https://www.llama.com/llama{version.replace('.', '_')}/license/",
    )


LICENCES: dict[str, Licence] = {
    "llama-guard-1": _llama("2", "", ""),
    "llama-guard-2": _llama("3", "Built with Meta Llama 3", "Llama-3-"),
    "llama-guard-3-8b": _llama("3.1", "Built with Llama", "Llama-3.1-"),
    "llama-guard-3-1b": _llama("3.2", "Built with Llama", "Llama-3.2-"),
}
"""By profile; a profile that is not here asks for nothing but its own LICENSE file."""


def artifact_name(profile: str, source: str, precision: str) -> str:
    """The default name: as the licence wants it to begin, then the source's own name, then the precision."""
    plain = source.rsplit("/", 1)[-1]
    licence = LICENCES.get(profile)
    if licence and licence.prefix:
        for family in (licence.prefix, "Meta-Llama-", "Llama-"):
            plain = plain.removeprefix(family)
        plain = licence.prefix + plain
    return f"{plain}-{precision}"


def write(profile: str, source_folder: Path, out: Path) -> None:
    """Copy the source's licence texts into the artifact and write NOTICE where the licence asks for it."""
    for file in source_folder.iterdir():
        if COPIED.fullmatch(file.name) and file.is_file():
            shutil.copyfile(file, out / file.name)
    if licence := LICENCES.get(profile):
        lines = [licence.attribution, *filter(None, [licence.built_with]), licence.url]
        (out / "NOTICE").write_text("\n".join(lines) + "\n", encoding="utf-8")


def bytes_of(source_folder: Path) -> int:
    """Of the licence texts that are copied."""
    return sum(file.stat().st_size for file in source_folder.iterdir() if COPIED.fullmatch(file.name) and file.is_file())


def duties(profile: str, name: str, files: Iterable[str]) -> list[str]:
    """What the user still has to do before passing the artifact on."""
    licence = LICENCES.get(profile)
    if licence is None:
        return []
    there = set(files)
    told = []
    for start, what in (("LICENSE", f"the text of the {licence.name}"), ("USE_POLICY", "Meta's acceptable use policy")):
        if not any(file.upper().startswith(start) for file in there):
            told.append(f"The source has no {start} file: add {what} ({licence.url}) to the artifact before you pass it on.")
    if not name.startswith(licence.prefix):
        told.append(f"The {licence.name} wants the name of a derived model to begin with {licence.prefix.rstrip('-')!r}; "
                    f"this one is called {name!r}.")
    return told
