"""Judge every line of a text file: one line out for each line in. Exit status: 0 all safe, 1 some unsafe, 2 error.

    python examples/classify_file.py lines.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgeguard import Guard


def classify(path: Path) -> bool:
    """Print verdict, score, codes and number of each line that is not blank; True if all are safe.

    Raises ValueError when there is no such line.
    """
    numbered = [(number, line) for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} holds no text, so nothing was judged.")
    all_safe = True
    with Guard.load() as guard:
        verdicts = guard.check_many(line for _, line in numbered)
        for (number, _), verdict in zip(numbered, verdicts, strict=True):
            print(f"{number}\t{verdict.verdict}\t{verdict.score:.3f}\t{','.join(verdict.codes)}", flush=True)
            all_safe &= verdict.safe
    return all_safe


def main(arguments: list[str]) -> int:
    """The exit status."""
    if len(arguments) != 1:
        print("usage: classify_file.py FILE", file=sys.stderr)
        return 2
    try:
        return 0 if classify(Path(arguments[0])) else 1
    except Exception as error:  # whatever it was, the file was not judged; Python's own status 1 would read as "unsafe"
        print(f"classify_file: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
