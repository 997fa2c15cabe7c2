"""A result as one HTML file that needs nothing else: no script, no font, no address is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import NamedTuple

from edgeguard.bench import sections
from edgeguard.bench.charts import style
from edgeguard.bench.markup import Child, Markup, joined, tag
from edgeguard.bench.result import Result, pairs, size_or_words, words
from edgeguard.bench.tables import table


class Section(NamedTuple):
    """A part of the page."""

    id: str
    title: str
    intro: str
    parts: Callable[[Result], Sequence[Markup]]


SECTIONS = (
    Section("headline", "One verdict", "The median time for one message, the usual way and edgeguard's best.", sections.headline),
    Section("targets", "Targets", "Ratios are of medians within this run. What was not measured is not met.", sections.targets),
    Section("ladder", "The ladder",
            "From the usual way (L0: a completion is generated and its text is read) to the fastest path, one step at a time: "
            "L1 one forward pass and the answer's row, L2 with the prefix kept, L3 with the best kernel and format, L4 in packs.",
            sections.ladder),
    Section("peers", "Other programs", "The same source weights and the same distinct prompts, taking turns in one run. A speed means "
            "little without the size of the weights and the share of verdicts they keep, so both stand beside it.", sections.peers),
    Section("length", "Time to verdict by length of text", "Medians are drawn through, 95th percentiles dashed; both axes are logarithmic.",
            sections.lengths),
    Section("cold", "Cold start", "From the start of a process to its first verdict.", sections.cold),
    Section("packed", "Packs", "Time a message when several are judged in one pass.", sections.packed),
    Section("memory", "Memory", "Resident memory counts mapped files, which the system can drop; anonymous memory it cannot.",
            sections.memory),
    Section("ceiling", "What the machine can do", "Measured in the same run; a share is what was reached of the ceiling.",
            sections.ceilings),
    Section("fidelity", "Fidelity", "Verdicts of each artifact and peer against those of the most exact artifact, on labelled texts.",
            sections.fidelity),
    Section("gpu", "GPU", "Scores and verdicts against the CPU's, and speed.", sections.gpu),
    Section("cost", "Cost per million tokens", "Electricity only, computed from the times above.", sections.costs),
    Section("missing", "What was not measured", "A reason for each.", sections.missing),
    Section("ran", "What really ran", "As each contender reported it, not as it was asked for.", sections.ran),
    Section("cells", "All cells", "Every number of this page is made from these; ids are those of the result file.",
            sections.all_cells),
)


class Shown(NamedTuple):
    """A section with what it shows."""

    id: str
    title: str
    intro: str
    parts: Sequence[Markup]


def document(title: str, top: Sequence[Child], shown: Sequence[Shown]) -> Markup:
    """A whole page: what stands first, links to the sections, the sections."""
    links = tag("nav", tag("ul", [tag("li", tag("a", each.title, href=f"#{each.id}")) for each in shown]), aria_label="Sections")
    head = tag(
        "head", tag("meta", charset="utf-8"), tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"), tag("title", f"edgeguard bench: {title}"),
        tag("style", style(), Markup(files("edgeguard.bench").joinpath("page.css").read_text("utf-8"))),
    )
    body = [tag("section", tag("h2", each.title), tag("p", each.intro, class_="soft"), each.parts, id=each.id) for each in shown]
    whole = tag("body", tag("header", *top, links), tag("main", body))
    return joined(Markup("<!doctype html>\n"), tag("html", head, whole, lang="en"), "\n")


def page(result: Result) -> Markup:
    """The whole document."""
    shown = [Shown(section.id, section.title, section.intro, parts) for section in SECTIONS if (parts := section.parts(result))]
    title, told = tag("h1", "What a verdict costs"), tag("p", f"{_name(result)}, {result.created}", class_="soft")
    return document(_name(result), (title, told, _random(result), _facts(result)), shown)


def _name(result: Result) -> str:
    return f"{words(result.model.get('name'))}, suite {result.suite}, edgeguard {result.edgeguard}"


def _random(result: Result) -> Markup | None:
    """Said first, since a reader who misses it would take the verdicts for a model's."""
    if not result.model.get("random"):
        return None
    told = ("The model has the true shape and tokenizer, its weights are random numbers. Times and memory are those of the real model; "
            "its verdicts, scores and fidelity cannot be read from this run.")
    return tag("div", tag("b", "RANDOM WEIGHTS. "), told, class_="loud", role="note")


def _facts(result: Result) -> Markup:
    """Machine and model."""
    machine, model = result.machine, result.model
    told = {
        "Processor": machine.get("cpu") or machine.get("arch"),
        "Cores, threads used": f"{words(machine.get('cores'))}, {words(machine.get('threads'))}",
        "Instructions": machine.get("flags"),
        "Memory": size_or_words("memory_bytes", machine.get("memory_bytes")),
        "System": f"{words(machine.get('os'))}, {words(machine.get('arch'))}, Python {words(machine.get('python'))}",
        "GPU": f"{machine['gpu']}, driver {words(machine.get('driver'))}" if "gpu" in machine else None,
        "Model": f"{words(model.get('name'))}, profile {words(model.get('profile'))}",
        "Weights": "random" if model.get("random") else "trained",
        "Shape": pairs(model.get("shape") or {}),
    }
    listed = tag("dl", [joined(tag("dt", name), tag("dd", words(value))) for name, value in told.items() if value])
    rows = [[words(each.get("label")), words(each.get("kind")), words(each.get("precision")), size_or_words("bytes", each.get("bytes")),
             tag("code", words(each.get("sha256"))[:16], title=words(each.get("sha256")))] for each in model.get("artifacts") or ()]
    artifacts = table("Artifacts", ("name", "kind", "precision", "on disk", "SHA-256"), rows) if rows else None
    return tag("section", listed, artifacts, id="machine")
