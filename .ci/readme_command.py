"""Prints the N-th shell block of README.md, so that CI runs what the README shows."""

import re
import sys
from pathlib import Path

text = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
sys.stdout.write(blocks[int(sys.argv[1]) - 1])
