"""One reader for each kind of file: its text in, the documents in it out; a document is a list of blocks in reading order."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator

import yaml

Document = list[str]

_TAG = re.compile(r"<[^>]+>")
_FENCE = re.compile(r"(\{\{[<%].*?[%>]\}\}|<!--.*?-->)", re.DOTALL)


def _plain(markup: str) -> str:
    return " ".join(html.unescape(_TAG.sub("", markup)).replace("\u2060", "").split())


def _elements(text: str, name: str) -> Document:
    return [block for found in re.findall(rf"<{name}(?: [^>]*)?>(.*?)</{name}>", text, re.DOTALL) if (block := _plain(found))]


def _paragraphs(text: str) -> Document:
    return [block.strip("\n") for block in re.split(r"\n[ \t]*\n", text) if block.strip()]


def ebook(text: str) -> Iterator[Document]:
    """XHTML of a book: its paragraphs."""
    yield _elements(re.sub(r"<a [^>]*noteref.*?</a>", "", text, flags=re.DOTALL), "p")


def tei(text: str) -> Iterator[Document]:
    yield _elements(text.partition("<body>")[2], "p")


def cnxml(text: str) -> Iterator[Document]:
    body = re.sub(r"<(note|exercise|figure|list|table|metadata|glossary)[ >].*?</\1>", "", text, flags=re.DOTALL)
    yield [block for block in _elements(body, "para") if len(block) > 80]


def law(text: str) -> Iterator[Document]:
    yield [" ".join([*_elements(text, "heading")[:1], *_elements(text, "text")])]


def markdown(text: str) -> Iterator[Document]:
    """Markdown or plain prose, without front matter and page templates' marks."""
    if text.startswith("---"):
        text = text.split("\n---", 1)[-1].lstrip("-\n")
    yield _paragraphs(_FENCE.sub("", text))


def gutenberg(text: str) -> Iterator[Document]:
    """A plain text of Project Gutenberg, without its header and licence."""
    yield _paragraphs(re.split(r"\*\*\*\s*(?:START|END) OF[^*]*\*\*\*", text)[1])


def whole(text: str) -> Iterator[Document]:
    """One short file, kept in one piece."""
    yield ["\n".join(_paragraphs(text.partition("\n---\n")[2] if text.startswith("---") else text))]


def code(text: str) -> Iterator[Document]:
    """Source code, cut at empty lines; licence headers are left out."""
    yield [block for block in _paragraphs(text) if not re.search(r"copyright|licen[sc]e", block, re.IGNORECASE)]


def lines(text: str) -> Iterator[Document]:
    yield [line.rstrip() for line in text.splitlines() if line.strip()]


def chat(text: str) -> Iterator[Document]:
    """An IRC log: what people said, without the time."""
    yield [re.sub(r"^\[[\d:]+\] ", "", line) for line in text.splitlines() if re.match(r"\[[\d:]+\] <", line)]


def tagged_zip(text: bytes) -> Iterator[tuple[str, Document]]:
    """The tagged MASC corpus: word_TAG tokens, joined to sentences and paragraphs again."""
    with zipfile.ZipFile(io.BytesIO(text)) as archive:
        kinds = dict(line.split() for line in archive.read("masc_tagged/categories.txt").decode().splitlines() if line.strip())
        for name, kind in sorted(kinds.items()):
            words = re.sub(r"(\S+)_\S+", r"\1", archive.read(f"masc_tagged/{name}").decode("utf-8", "replace"))
            words = re.sub(r" :(?= |$) ?", ": ", re.sub(r" ([.,;!?)\]%]|'\w+|n't)(?=\s|$)", r"\1", re.sub(r"([(\[$#]) ", r"\1", words)))
            blocks = (block for block in _paragraphs(words) if "docno = " not in block)
            yield kind, ["\n".join(line.strip() for line in block.splitlines() if line.strip()) for block in blocks]


def conllu(text: str) -> Iterator[Document]:
    """Sentences of a treebank, joined to paragraphs."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("# newpar"):
            blocks.append([])
        elif line.startswith("# text = "):
            blocks[-1].append(line[9:])
    yield [" ".join(block) for block in blocks if block]


def factbook(text: str) -> Iterator[Document]:
    def leaves(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("text"), str):
                yield _plain(value["text"])
            for inner in value.values():
                yield from leaves(inner)
    yield [leaf for leaf in leaves(json.loads(text)) if len(leaf) > 120]


def fields(*names: str) -> Callable[[str], Iterator[Document]]:
    """The named string fields of a JSON or YAML object, or of each object where the top level maps ids to objects."""
    def read(text: str) -> Iterator[Document]:
        data = yaml.safe_load(text) if text.lstrip()[:1] not in "{[" else json.loads(text)
        many = isinstance(data, dict) and all(isinstance(value, dict) for value in data.values())
        for item in data.values() if many else [data or {}]:
            values = [item.get(name) for name in names]
            texts = [" ".join(value) if isinstance(value, list) else str(value) for value in values if value]
            if texts:
                yield ["\n".join(_plain(value) if "<" in value else value.strip() for value in texts)]
    return read


def table(*names: str) -> Callable[[str], Iterator[Document]]:
    """The named columns of a CSV table, each cell a document of lines."""
    def read(text: str) -> Iterator[Document]:
        for row in csv.DictReader(io.StringIO(text)):
            for name in names:
                yield [line for line in row[name].splitlines() if line.strip()]
    return read


def dialogues(text: str) -> Iterator[Document]:
    for dialogue in json.loads(text):
        yield [f"{turn['speaker']}: {turn['text']}" for turn in dialogue["utterances"]]


def abcd(text: str) -> Iterator[Document]:
    for dialogue in json.loads(text):
        yield [f"{speaker}: {words}" for speaker, words in dialogue["original"] if speaker != "action"]


READERS: dict[str, Callable[[str], Iterator[Document]]] = {
    "ebook": ebook, "tei": tei, "cnxml": cnxml, "law": law, "markdown": markdown, "gutenberg": gutenberg, "whole": whole,
    "code": code, "lines": lines, "chat": chat, "conllu": conllu, "factbook": factbook, "dialogues": dialogues, "abcd": abcd,
    "museum": fields("Title", "Description"),
    "advisory": fields("details"),
    "vulnerability": fields("title", "overview", "recommendation"),
    "abstracts": fields("QUESTION", "CONTEXTS", "LONG_ANSWER"),
    "clinic": table("section_text", "dialogue"),
    "encounter": table("note", "dialogue"),
}
