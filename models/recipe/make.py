"""Makes the mini guard from its data to its calibrated artifacts: python models/recipe/make.py --out DIR [options of train.py].

A training that was stopped goes on, and what is complete is not made again (but for the rows, which take seconds), so the same
command takes up where it ended; with other options it is refused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from left_out import begin

RECIPE = Path(__file__).parent
DATA = RECIPE / "data"
NAME = "edgeguard-mini"
TRAINED = "mini"
SETTINGS = ("--seed", "3", "--compile")
"""What the shipped version was trained with; options on the command line come behind them and win."""
WRITTEN_LAST = "tokenizer_config.json"
EDGEGUARD = ("-m", "edgeguard")


def steps(out: Path, training: list[str]) -> Iterator[list[str]]:
    """Commands that are still to be run, without the Python in front; what there is already is looked at when a step's turn has come."""
    rows, mini, gguf, onnx = out / "rows", out / TRAINED, out / "mini-gguf", out / "mini-onnx"
    yield [str(RECIPE / "synthetic" / "build.py"), "--out", str(rows), "--seed", "1"]
    more = [*sorted(rows.glob("*.jsonl.gz")), *sorted((DATA / "benign").glob("*-train.jsonl.gz"))]
    if not (mini / "final" / WRITTEN_LAST).exists():
        yield [str(RECIPE / "train.py"), "--corpus", str(DATA), "--more", *map(str, more), "--out", str(mini), *SETTINGS, *training]
    for source, kind, precision, made in ((mini / "final", "gguf", "q8_0", gguf), (gguf, "onnx", "int8", onnx)):
        profile = ["--profile", NAME] if source != gguf else []
        if not made.exists():
            yield [*EDGEGUARD, "convert", str(source), "--to", kind, "--precision", precision, *profile, "--name", NAME, "--out", str(made)]
    for made in (onnx, gguf):
        if not json.loads((made / "manifest.json").read_text(encoding="utf-8")).get("calibration"):
            yield [*EDGEGUARD, "calibrate", str(DATA / "val.jsonl.gz"), "--model", str(made), "--artifact"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    args, training = parser.parse_known_args()
    begin(args.out / TRAINED, training, parser)
    for command in steps(args.out, training):
        print("python", *command, flush=True)
        if status := subprocess.run([sys.executable, *command], check=False).returncode:  # noqa: S603  commands of the recipe
            raise SystemExit(f"That ended with status {status}; once its reason is mended, the same command goes on from here.")
    print(f"{args.out / 'mini-gguf'} and {args.out / 'mini-onnx'} are made and calibrated")


if __name__ == "__main__":
    main()
