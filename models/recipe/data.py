"""The rows that the mini guard is trained on: licences, weights and the training prompt.

A corpus is a folder with train.jsonl.gz and val.jsonl.gz: conversations with `source`, `license`, `role`, `messages`, `label`,
`categories`, `categories_known` and `quality`. The folder data/ beside this file holds the rows whose licence lets them be
passed on, written from a larger corpus by `python models/recipe/data.py CORPUS OUT`; its README names sources and licences.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from row_file import rows, write
from tokenizers import Tokenizer

LICENSES = {"MIT", "Apache-2.0", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "ODC-BY-1.0"}
LEFT_OUT = {"refusal_direction", "jbb_artifacts"}  # their labels come from Llama models, whose licence forbids training others
SHARES = {"davidson": 0.5, "clinc150": 0.4, "mitre_frr": 0.4, "medquad": 0.2, "caia_safety": 0.25, "counsel_chat": 0.25,
          "gpteacher_roleplay": 0.5, "gpteacher_codegen": 0.4, "gsm8k": 0.4, "diasafety": 0.8, "gptfuzz": 0.3, "gptfuzz_templates": 0.7,
          "aisafetylab": 0.45, "sap200": 0.3, "coconot_contrast": 0.7, "self_instruct": 0.6, "nl2bash": 0.6,
          "edgeguard-responses": 0.2, "edgeguard-model-replies": 0.32, "edgeguard-hard-pairs": 0.6, "edgeguard-statements": 0.8,
          "edgeguard-chat": 0.8, "edgeguard-languages": 0.8}
"""Parts of sources that hold many rows of one kind, or long ones; of the others every row is taken."""
QUALITY = {"gold": 1.0, "silver": 0.8, "weak": 0.4}
JUDGED_TOKENS, CONTEXT_TOKENS = 224, 96


@dataclass(frozen=True)
class Example:
    ids: list[int]
    """Prompt and answer."""
    answer: int
    """Index of the answer's first token."""
    weights: list[float]
    """Loss weight of each answer token."""


def free_license(row: dict[str, Any]) -> bool:
    text = str(row["license"]).split(" ")[0]
    return text in LICENSES and row["source"] not in LEFT_OUT


def unit(row_id: str, seed: int) -> float:
    """A number in [0, 1) that depends on the row and the seed alone."""
    return int(hashlib.sha256(f"{seed}:{row_id}".encode()).hexdigest()[:12], 16) / 16**12


def chosen(row: dict[str, Any], seed: int) -> bool:
    return unit(row["id"], seed) < SHARES.get(row["source"], 1.0)


def gather(corpus: Path, more: Sequence[Path], seed: int, left_out: Collection[str] = ()) -> list[dict[str, Any]]:
    """The rows to train on: those chosen of the corpus and of the further files, without the sources that are left out."""
    found = [row for row in rows(corpus / "train.jsonl.gz") if free_license(row)]
    found += [row for path in more for row in rows(path)]
    return [row for row in found if row["source"] not in left_out and chosen(row, seed)]


def cut(ids: list[int], limit: int, at: float) -> list[int]:
    """At most `limit` tokens: the end (where replies and requests conclude) or, for a third of the rows, the beginning."""
    return ids if len(ids) <= limit else (ids[:limit] if at < 1 / 3 else ids[-limit:])


def encode(row: dict[str, Any], tokenizer: Tokenizer, seed: int) -> Example:
    """The mini's prompt (profile `edgeguard-mini`) and the answer with its loss weights."""
    def text(value: str) -> list[int]:
        return list(tokenizer.encode(value, add_special_tokens=False).ids)

    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    ids: list[int] = []
    for index, message in enumerate(row["messages"]):
        limit = JUDGED_TOKENS if index == len(row["messages"]) - 1 else CONTEXT_TOKENS
        body = cut(text(message["content"].strip().replace("<|", "< |")), limit, unit(row["id"], seed + 1))
        ids += [start, *text(f"{message['role']}\n"), *body, end, *text("\n")]
    ids += [start, *text(f"verdict {row['role']}\n")]
    codes = sorted(row["categories"], key=lambda code: int(code[1:])) if row["categories_known"] else []
    answer = text("safe" if row["label"] == "safe" else "unsafe")
    weights = [1.0] + [0.3] * (len(answer) - 1)
    if row["label"] == "safe" or codes:
        rest = text("\n" + ",".join(codes)) if codes else []
        answer, weights = answer + rest + [end], weights + [0.3] * (len(rest) + 1)
    scale = QUALITY[row["quality"]]
    return Example(ids + answer, len(ids), [weight * scale for weight in weights])


def select(corpus: Path, out: Path) -> None:
    """Writes the freely licensed rows of a corpus; the same input gives the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl.gz", "val.jsonl.gz"):
        write(out / name, (row for row in rows(corpus / name) if free_license(row)))


if __name__ == "__main__":
    select(Path(sys.argv[1]), Path(sys.argv[2]))
