"""Builds the benign texts and the unsafe twins: `python models/recipe/benign/build.py --sources DIR --out DIR`.

DIR of the sources holds one bare git directory for each repository in sources.yaml, OWNER+NAME/repo. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from filters import SCARY, in_language, masked, passes  # noqa: E402
from grammar import written  # noqa: E402
from readers import READERS, Document, tagged_zip  # noqa: E402
from row_file import write  # noqa: E402

SEED = 4
LENGTHS = ((40, 200, 0.25), (200, 600, 0.45), (600, 1200, 0.25), (1200, 3000, 0.05))
SCARY_SHARE = 0.45
"""Share of a source's rows that are taken from its texts with scary words, as far as there are so many."""
WHOLE = {"whole", "museum", "advisory", "vulnerability", "law"}
LINE_KINDS = {"lines", "chat", "clinic", "encounter", "dialogues", "abcd"}
FILES, EXCERPTS = 150, 100
"""At most so many files of a source and excerpts of a document are looked at."""
SHARED_RUN = 13


class Repository:
    """A bare git directory, read at one commit."""

    def __init__(self, folder: Path, commit: str) -> None:
        self.git = ["git", f"--git-dir={folder}"]
        self.commit = commit

    def run(self, *arguments: str, given: bytes = b"") -> bytes:
        return subprocess.run([*self.git, *arguments], check=True, capture_output=True, input=given).stdout  # noqa: S603

    def paths(self) -> list[str]:
        return self.run("ls-tree", "-r", "-z", "--name-only", self.commit).decode("utf-8", "replace").split("\0")

    def read(self, paths: list[str]) -> Iterator[tuple[str, bytes]]:
        """Path and content; files that the snapshot lacks (large ones) are left out."""
        wanted = "".join(f"{self.commit}:{path}\n" for path in paths).encode()
        stream = io.BytesIO(self.run("cat-file", "--batch", given=wanted))
        for path in paths:
            header = stream.readline().split()
            if header[-1] != b"missing":
                yield path, stream.read(int(header[-1]))
                stream.read(1)

    def messages(self) -> Iterator[tuple[str, str]]:
        """Commits with a body: hash and message, without trailers and merge commits."""
        for entry in self.run("log", "--no-merges", "-n6000", "--format=%H%n%B%x00", self.commit).decode("utf-8", "replace").split("\0"):
            name, _, message = entry.strip().partition("\n")
            kept = [line for line in message.splitlines() if not re.match(r"\s*[A-Z][A-Za-z-]+-by:|Change-Id|\s*\(?cherry", line)]
            if len(kept) > 2:
                yield name, "\n".join(kept).strip()


def unit(*values: object) -> float:
    return int(hashlib.sha256(":".join(map(str, (SEED, *values))).encode()).hexdigest()[:12], 16) / 16**12


def documents(repository: Repository, source: dict[str, Any]) -> Iterator[tuple[str, Document]]:
    """Path (or commit, or file in an archive) and blocks."""
    if source["kind"] == "commits":
        yield from ((name, [message]) for name, message in repository.messages())
        return
    if source["kind"] == "masc":
        for path, archive in repository.read(source["paths"]):
            yield from ((path, blocks) for kind, blocks in tagged_zip(archive) if kind in source["only"])
        return
    left_out = source.get("not", [])
    found = [path for path in repository.paths() if any(fnmatch(path, pattern) for pattern in source["paths"])
             and not any(fnmatch(path, pattern) for pattern in left_out)]
    found.sort(key=lambda path: unit(source["name"], path))
    for path, content in repository.read(found[:source.get("files", FILES)]):
        text = content.decode("utf-8", "replace").replace("\r\n", "\n")
        if text.strip():
            yield from ((path, blocks) for blocks in READERS[source["kind"]](text))


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, cut after a sentence or a line."""
    if len(text) <= limit:
        return text
    ends = [found.end() for found in re.finditer(r"[.!?][\"”\u2019)]*(?=\s)|\n", text[:limit])]
    return text[:ends[-1]].rstrip() if ends else ""


def excerpts(blocks: Document, kind: str, generator: random.Random) -> Iterator[str]:
    """Runs of whole blocks, of mixed lengths."""
    joint = "\n" if kind in LINE_KINDS else "\n\n"
    position = 0
    while position < len(blocks):
        low, high = generator.choices([bounds[:2] for bounds in LENGTHS], [bounds[2] for bounds in LENGTHS])[0]
        target = 3000 if kind in WHOLE else generator.randint(low, high)
        start, size = position, 0
        while position < len(blocks) and (size == 0 or size + len(blocks[position]) <= target):
            size += len(blocks[position]) + len(joint)
            position += 1
        text = shortened(joint.join(blocks[start:position]).strip(), target)
        if len(text) >= 40:
            yield text


def candidates(source: dict[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    """Origin and text of what passes the filters."""
    git = folder / source["repository"].replace("/", "+") / "repo"
    repository = Repository(git if (git / "HEAD").exists() else git / ".git", source["commit"])
    foreign = source["register"].partition("non-english-")[2]
    for path, blocks in documents(repository, source):
        generator = random.Random(f"{SEED}:{source['name']}:{path}")
        found = list(excerpts(blocks, source["kind"], generator))
        for text in generator.sample(found, min(len(found), EXCERPTS)):
            clean = masked(text)
            if passes(clean, source["kind"]) and (not foreign or in_language(clean, foreign)):
                yield f"{source['repository']}@{source['commit'][:12]}:{path}", clean


def chosen(source: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """At most `rows` texts, scary ones first up to their share, at most `each` of one file."""
    found = sorted(set(candidates(source, folder)), key=lambda pair: unit(source["name"], *pair))
    scary = [pair for pair in found if SCARY.search(pair[1])]
    calm = [pair for pair in found if not SCARY.search(pair[1])]
    first = scary[:round(SCARY_SHARE * source["rows"])]
    counts: dict[str, int] = {}
    kept: list[tuple[str, str]] = []
    for origin, text in [*first, *calm, *scary[len(first):]]:
        counts[origin] = counts.get(origin, 0) + 1
        if counts[origin] <= source.get("each", 1000) and len(kept) < source["rows"]:
            kept.append((origin, text))
    return kept


def sourced(half: str, folder: Path) -> Iterator[dict[str, Any]]:
    for source in yaml.safe_load((HERE / "sources.yaml").read_text(encoding="utf-8")):
        if source["half"] == half:
            rows = chosen(source, folder)
            print(f"{half:7} {source['name']:28} {len(rows):4} of {source['rows']}", file=sys.stderr)
            yield from (row(source["name"], source["license"], source["register"], text, origin) for origin, text in rows)


def row(source: str, license_name: str, register: str, text: str, origin: str, codes: Iterable[str] = ()) -> dict[str, Any]:
    codes = list(codes)
    return {
        "id": f"{source}-{hashlib.sha256(text.encode()).hexdigest()[:12]}", "source": source, "license": license_name, "role": "user",
        "messages": [{"role": "user", "content": text}], "label": "unsafe" if codes else "safe",
        "categories": codes, "categories_known": True,
        "quality": "gold" if origin.startswith("grammar:") else "silver", "register": register, "origin": origin,
    }


def runs(text: str, size: int = SHARED_RUN) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[at:at + size]) for at in range(len(words) - size + 1)}


def text_of(item: dict[str, Any]) -> str:
    return str(item["messages"][0]["content"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, help="folder of the git directories; without it only the twins are built")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for half in ("train", "frozen"):
        write(options.out / f"twins-{half}.jsonl.gz",
              (row(f"twins_{half}", "Apache-2.0", *rest) for rest in written(HERE / f"twins-{half}.yaml", SEED)))
    if options.sources is None:
        return
    seen: set[str] = set()
    for half in ("frozen", "train"):
        own = (row(f"written_{half}", "Apache-2.0", *rest) for rest in written(HERE / f"benign-{half}.yaml", SEED))
        rows = {text_of(item): item for item in [*own, *sourced(half, options.sources)] if not runs(text_of(item)) & seen}
        seen.update(*(runs(text) for text in rows))
        write(options.out / f"benign-{half}.jsonl.gz", rows.values())


if __name__ == "__main__":
    main()
