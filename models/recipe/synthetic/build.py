"""Writes the synthetic rows and prints what they are: python models/recipe/synthetic/build.py --out DIR --seed 1."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from row_file import write

from synthetic.chat import chat
from synthetic.hard_pairs import hard_pairs
from synthetic.languages import languages
from synthetic.model_replies import model_replies
from synthetic.registers import registers
from synthetic.responses import responses
from synthetic.rows import Row, plain
from synthetic.statements import statements

KINDS = {"hard-pairs": hard_pairs, "responses": responses, "languages": languages, "statements": statements, "chat": chat,
         "model-replies": model_replies, "registers": registers}


def report(name: str, rows: list[Row]) -> str:
    """Counts by label, kind and category, distinct frames, and the share of the judged messages' 5-grams that occur once."""
    labels = Counter(row["label"] for row in rows)
    kinds = Counter(row["kind"].rpartition("/")[0] + " " + row["label"] for row in rows)
    codes = Counter(code for row in rows for code in row["categories"])
    grams: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        words = plain(row["messages"][-1]["content"]).split()
        grams.update(zip(*(words[start:] for start in range(5)), strict=False))
    once = sum(count == 1 for count in grams.values())
    frames = len({row["frame"] for row in rows})
    lines = [f"{name}: {len(rows)} rows, {labels['safe']} safe, {labels['unsafe']} unsafe, {frames} frames",
             f"  5-grams: {len(grams)} different, {once / len(grams):.0%} of them once, {len(grams) / sum(grams.values()):.0%} of all",
             "  " + ", ".join(f"S{i} {codes[f'S{i}']}" for i in range(1, 12)),
             "  " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the .jsonl.gz files")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, make in KINDS.items():
        rows = make(args.seed)
        write(args.out / f"{name}.jsonl.gz", rows)
        print(report(name, rows), flush=True)


if __name__ == "__main__":
    main()
