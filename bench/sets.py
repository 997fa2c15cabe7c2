"""Public sets of labelled texts, each by its own rule; they are for measuring only, and the files are the reader's to get.

The columns are those of the files as published; each rule stands in the table `SETS`. Nothing is guessed: a file that is not there or not
of its set is an error, and a row that a rule does not judge is left out, counted, and told in the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from edgeguard.bench import set_classes
from edgeguard.bench.row_files import LeftOut, Record, read_content, records
from edgeguard.bench.rows import OWN, SLUGS, Data, Row, read_rows
from edgeguard.bench.set_classes import Classes
from edgeguard.conversation import Conversation, Message
from edgeguard.errors import ConversationError, InputError
from edgeguard.verdict import Role

ROLES: tuple[Role, ...] = ("user", "assistant")
OPENAI_FLAGS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
AEGIS_LABELS = ("labels_0", "labels_1", "labels_2")
HUMANS = ("human_0", "human_1", "human_2")
HARM = {"harmful": True, "unharmful": False}
SAFETY = {"unsafe": True, "safe": False}


class Item(NamedTuple):
    """What a rule makes of a record."""

    texts: tuple[str, ...]
    """The user's message, and the reply where that is judged."""
    unsafe: bool
    classes: tuple[str, ...]
    """As the set names them."""
    source: str
    """The part of the set that it belongs to."""


@dataclass(frozen=True)
class PublicSet:
    """A published set, read by one rule."""

    name: str
    title: str
    file: str
    """As published."""
    role: Role
    """Whose message is judged."""
    rule: str
    """What is unsafe, in words."""
    read: Callable[[Record], Item]
    classes: Classes


def load(path: Path, name: str = OWN) -> Data:
    """The rows of a file of one set; raises `StoreError` where it cannot be read, `InputError` naming column and line of what is wrong."""
    if name == OWN:
        return read_rows(path)
    chosen = find(name)
    plain, digest = read_content(path)
    rows: list[Row] = []
    left_out: dict[str, list[int]] = {}
    uncoded: Counter[str] = Counter()
    for record in records(path, plain):
        try:
            item = chosen.read(record)
            rows.append(_row(record.line, item, chosen))
        except LeftOut as reason:
            left_out.setdefault(str(reason), []).append(record.line)
        except InputError as error:
            raise InputError(f"{path}, line {record.line}: {error} It is read as {chosen.title} ({chosen.file}).") from error
        else:
            uncoded.update(each for each in item.classes if item.unsafe and each and each.lower() not in chosen.classes)
    if not rows:
        raise InputError(f"{path} holds no row to judge, read as {chosen.title}.")
    told = {reason: tuple(lines) for reason, lines in left_out.items()}
    return Data(tuple(rows), path.name, digest, len(rows), name, told, dict(uncoded))


def find(name: str) -> PublicSet:
    """A set of the table; raises `InputError` naming those that there are."""
    if name not in SETS:
        raise InputError(f"There is no set {name!r}; there are {', '.join((OWN, *SETS))}.")
    return SETS[name]


def _row(line: int, item: Item, chosen: PublicSet) -> Row:
    """Its codes count only where every class that it names has one."""
    codes = [chosen.classes.get(each.lower()) for each in item.classes if each] if item.unsafe else []
    slugs = frozenset(SLUGS[code] for code in codes if code) if all(codes) else frozenset[str]()
    messages = [Message(role, text) for role, text in zip(ROLES, item.texts, strict=False)]
    try:
        conversation = Conversation.of(messages, chosen.role)
    except ConversationError:
        raise LeftOut("no text to judge") from None
    return Row(line, conversation, item.unsafe, slugs, item.source or chosen.name)


def _xstest(record: Record) -> Item:
    kind = record.name("type")
    unsafe = kind.startswith("contrast_")
    if not unsafe and kind not in set_classes.XSTEST_SAFE:
        raise InputError("the column 'type' holds no type of the set.")
    if "label" in record.values and record.choice("label", SAFETY) != unsafe:
        raise InputError("the columns 'type' and 'label' contradict each other.")
    return Item((record.text("prompt"),), unsafe, (kind,), kind)


def _openai_moderation(record: Record) -> Item:
    known = [name for name in OPENAI_FLAGS if record.values.get(name) is not None]  # a flag that is not given is not known
    if not known:
        raise InputError(f"none of the columns {', '.join(OPENAI_FLAGS)} is there.")
    classes = tuple(name for name in known if record.flag(name))
    return Item((record.text("prompt"),), bool(classes), classes, "")


def _beavertails(record: Record) -> Item:
    classes = record.value("category")
    if not isinstance(classes, dict) or not all(isinstance(value, bool) for value in classes.values()):
        raise InputError("the column 'category' is no object of classes that are true or false.")
    named = tuple(name for name, value in classes.items() if value)
    return Item((record.text("prompt"), record.text("response")), not record.flag("is_safe"), named, "")


def _toxicchat(record: Record) -> Item:
    return Item((record.text("user_input"),), record.flag("toxicity"), (), _part(record, "jailbreaking"))


def _part(record: Record, name: str) -> str:
    """The part of a set that a flag tells apart, where the file has the flag."""
    if name not in record.values:
        return ""
    return name if record.flag(name) else f"not {name}"


def _toxicchat_human(record: Record) -> Item:
    if not record.flag("human_annotation"):
        raise LeftOut("not labelled by a person")
    return _toxicchat(record)


def _simple_safety_tests(record: Record) -> Item:
    area = record.name("harm_area")
    text = "prompts_final" if "prompts_final" in record.values else "prompt"  # as on GitHub, and as on Hugging Face
    return Item((record.text(text),), True, (area,), area)


def _harmbench(record: Record) -> Item:
    category = record.name("SemanticCategory")
    parts = [record.text("Behavior"), *([record.text("ContextString")] if record.name("FunctionalCategory") == "contextual" else [])]
    return Item(("\n\n".join(parts),), True, (category,), category)


def _harmbench_responses(record: Record) -> Item:
    if "test_case" in record.values:
        prompt = record.text("test_case")
    else:
        context = record.value("context") if "context" in record.values else None
        prompt = record.text("behavior") + (f"\n\n{record.text('context')}" if context else "")
    votes = sum(record.flag(name) for name in HUMANS)
    return Item((prompt, record.text("generation")), votes >= 2, (), "")


def _wildguard(record: Record) -> Item:
    classes = (record.name("subcategory"),) if "subcategory" in record.values else ()
    return Item((record.text("prompt"),), record.choice("prompt_harm_label", HARM), classes, _part(record, "adversarial"))


def _wildguard_responses(record: Record) -> Item:
    item = _wildguard(replace(record, values={**record.values, "prompt_harm_label": record.value("response_harm_label")}))
    return item._replace(texts=(*item.texts, record.text("response")))


def _aegis(record: Record) -> Item:
    if record.name("text_type") != "user_message":
        raise LeftOut("not a user's message alone")
    labels = [record.name(name) for name in AEGIS_LABELS]
    if not any(labels):
        raise LeftOut("no label")
    if missing := [name for name, label in zip(AEGIS_LABELS, labels, strict=True) if not label]:
        raise InputError(f"the column {missing[0]!r} is empty, and others are not.")
    named = Counter(part.strip() for label in labels for part in label.split(","))
    classes = tuple(name for name, votes in named.items() if votes >= 2 and name.lower() not in ("", "safe"))
    return Item((record.text("text"),), sum(label.lower() == "safe" for label in labels) < 2, classes, "")


def _aegis_2(record: Record) -> Item:
    classes = tuple(part.strip() for part in record.name("violated_categories").split(",") if part.strip())
    return Item((_not_redacted(record),), record.choice("prompt_label", SAFETY), classes, "")


def _aegis_2_responses(record: Record) -> Item:
    item = _aegis_2(replace(record, values={**record.values, "prompt_label": record.value("response_label")}))
    return item._replace(texts=(*item.texts, record.text("response")))


def _not_redacted(record: Record) -> str:
    text = record.text("prompt")
    if text.strip() == "REDACTED":
        raise LeftOut("redacted text")
    return text


_WILDGUARD = "{0} harmful is unsafe, unharmful safe; rows without that label are left out."
SETS: dict[str, PublicSet] = {each.name: each for each in (
    PublicSet("xstest", "XSTest", "xstest_prompts.csv", "user", "Types that begin with contrast_ are unsafe.", _xstest, set_classes.XSTEST),
    PublicSet("openai-moderation", "OpenAI moderation", "samples-1680.jsonl.gz", "user",
              "Unsafe if any of the flags that are given is 1.", _openai_moderation, set_classes.OPENAI_MODERATION),
    PublicSet("beavertails", "BeaverTails", "test.jsonl.gz of 30k, test.jsonl.xz of 330k", "assistant", "is_safe false is unsafe.",
              _beavertails, set_classes.BEAVERTAILS),
    PublicSet("toxicchat", "ToxicChat", "toxic-chat_annotation_test.csv", "user", "toxicity 1 is unsafe, on all rows.", _toxicchat, {}),
    PublicSet("toxicchat-human", "ToxicChat, labelled by people", "toxic-chat_annotation_test.csv", "user",
              "toxicity 1 is unsafe; rows that no person labelled are left out.", _toxicchat_human, {}),
    PublicSet("simplesafetytests", "SimpleSafetyTests", "sst_test_cases.csv or SimpleSafetyTests - test cases.csv", "user",
              "Every row is unsafe.", _simple_safety_tests, set_classes.SIMPLE_SAFETY_TESTS),
    PublicSet("harmbench", "HarmBench behaviors", "harmbench_behaviors_text_test.csv", "user",
              "Every row is unsafe; a contextual behavior is followed by its context.", _harmbench, set_classes.HARMBENCH),
    PublicSet("harmbench-responses", "HarmBench responses", "text_behaviors_val_set.json", "assistant",
              "Unsafe if at least two of the three people said so.", _harmbench_responses, {}),
    PublicSet("wildguard", "WildGuard test, prompts", "wildguard_test as .jsonl or .csv", "user", _WILDGUARD.format("prompt_harm_label"),
              _wildguard, set_classes.WILDGUARD),
    PublicSet("wildguard-responses", "WildGuard test, responses", "wildguard_test as .jsonl or .csv", "assistant",
              _WILDGUARD.format("response_harm_label"), _wildguard_responses, set_classes.WILDGUARD),
    PublicSet("aegis", "Aegis 1.0 test, prompts", "the test file as .jsonl or .csv", "user",
              "Safe if at least two of the first three people said Safe, else unsafe; other texts than user messages are left out.",
              _aegis, set_classes.AEGIS),
    PublicSet("aegis-2", "Aegis 2.0 test, prompts", "test.json", "user",
              "prompt_label; redacted texts and rows without the label are left out.", _aegis_2, set_classes.AEGIS),
    PublicSet("aegis-2-responses", "Aegis 2.0 test, responses", "test.json", "assistant",
              "response_label; redacted texts and rows without a reply or the label are left out.", _aegis_2_responses, set_classes.AEGIS),
)}
"""By the name that `--set` takes."""
