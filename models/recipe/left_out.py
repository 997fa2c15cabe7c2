"""How the recipe judges sources it never saw: python models/recipe/left_out.py --corpus DIR --out DIR [--folds N] [options of train.py].

The sources are dealt out to folds. For each fold a model is trained on all others; every validation row is then scored by the
model that saw nothing of its source. Sources of one origin (`coconot_contrast`, `coconot_other`) stay together. Run again
after a stop, it goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from data import free_license
from measures import SCORES, by_source
from row_file import rows

TRAIN = Path(__file__).with_name("train.py")
OPTIONS = "options.json"
"""Where a training keeps what it was begun with: it does not go on with other options, and folds of several are not put into one table."""
COLUMNS = ("rows", "f1", "recall", "fpr", "auprc", "ece")


def dealt(sizes: Mapping[str, int], folds: int) -> list[list[str]]:
    """Sources by fold: origins from the largest on, each to the fold that holds the fewest rows."""
    origins: dict[str, list[str]] = {}
    for source in sorted(sizes):
        origins.setdefault(source.split("_")[0], []).append(source)
    hands: list[list[str]] = [[] for _ in range(folds)]
    for sources in sorted(origins.values(), key=lambda names: -sum(sizes[name] for name in names)):
        min(hands, key=lambda hand: sum(sizes[name] for name in hand)).extend(sources)
    return hands


def begin(out: Path, options: list[str], parser: argparse.ArgumentParser) -> None:
    """Note the options of the training in a folder; ends the run when it was begun with others."""
    begun = out / OPTIONS
    if begun.exists():
        if begun.read_text(encoding="utf-8") == json.dumps(options):
            return
        parser.error(f"{out} was begun with other options; give another --out, or delete it")
    if out.exists():
        parser.error(f"{out} does not say with which options it was begun; give another --out, or delete it")
    out.mkdir(parents=True)
    begun.write_text(json.dumps(options), encoding="utf-8")


def table(measured: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
    """Markdown, a source a line."""
    yield f"| left out | {' | '.join(COLUMNS)} |"
    yield f"| --- |{' --- |' * len(COLUMNS)}"
    for name, values in measured.items():
        yield f"| {name} | {' | '.join(str(values.get(column, '')) for column in COLUMNS)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train.jsonl.gz and val.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=4)
    args, training = parser.parse_known_args()
    held = [row for row in rows(args.corpus / "val.jsonl.gz") if free_license(row)]
    scored = []
    for fold, sources in enumerate(dealt(Counter(row["source"] for row in held), args.folds)):
        out = args.out / f"fold-{fold}"
        options = ["--corpus", str(args.corpus.resolve()), "--out", str(out.resolve()), *training, "--left-out", *sources]
        begin(out, options, parser)
        if not (out / SCORES).exists():
            subprocess.run([sys.executable, str(TRAIN), *options], check=True)  # noqa: S603
        scored += [row for row in rows(out / SCORES) if row["source"] in sources]
    measured = by_source(scored)
    (args.out / "left-out.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(dict(sorted(measured.items(), key=lambda item: -item[1]["rows"])))))


if __name__ == "__main__":
    main()
