"""The README's tables of results say what the stored runs hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = re.compile(r"\(docs/results/([a-z0-9-]+)\.json\)")
NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*(x|GiB|ms|s|GB|%)?")

TARGETS = {
    "llama-cpp-python's first call over edgeguard": "8B, safe verdict: llama-cpp-python q4_k_m, first call, over edgeguard's best CPU path",
    "its steady stream over edgeguard": "8B, safe verdict: llama-cpp-python q4_k_m, steady stream, over the same",
    "4-bit MatMulNBits with a kept prefix over edgeguard": "8B, safe verdict: onnxruntime-genai int4 with cached prefix, over the same",
    "time of the whole pass over that of its matrix products, weights from the cache":
        "8B, 77-token pass: measured GEMM ceiling over edgeguard's achieved rate",
    "unsafe with one code over safe": "8B: unsafe with one code over safe",
    "16 messages in a pass, for each, over one by one": "8B, packed 16 messages: per message, over one by one",
    "process start to first verdict, stored prefix over evaluating it":
        "8B int8, process start to first verdict: with the stored prefix over evaluating it",
    "anonymous memory over the weights, int8": "8B int8, anonymous memory at load and in steady state, over the weights",
    "8,000 tokens: peak memory above the weights": "8B, 8,000-token conversation: peak memory above the weights, GiB",
}
"""Rows of the table of ratios, and what each is called in a run."""
MINI = {
    "transformers, fp32": "peers/transformers-fp32",
    "llama-cpp-python, `create_completion`, q4_k_m": "ladder/L0/gguf-q4_k_m",
    "llama-cpp-python, `create_completion`, q8_0": "ladder/L0/gguf-q8_0",
    "llama-cpp-python, `create_completion`, q4_0": "peers/llama-cpp-python-q4_0",
    "openvino-genai, GGUF q8_0, prefix caching": "peers/openvino-q8_0",
    "onnxruntime-genai, int4, rewound to the prefix": "peers/onnxruntime-genai-int4",
    "optimum ORTModelForCausalLM, fp32": "peers/optimum-fp32",
    "edgeguard, llama backend, q4_0": "ladder/L2/gguf-q4_0",
    "edgeguard, onnx backend, int4": "ladder/L2/onnx-int4",
    "edgeguard, onnx backend, int8": "ladder/L2/onnx-int8",
}
"""Rows of the built-in model's table, and the cells they are of."""


def run(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8")))


def table(words: str) -> list[list[str]]:
    """The cells of the table whose header holds these words, header first."""
    lines = README.split("\n")
    start = next(place for place, line in enumerate(lines) if line.startswith("|") and words in line)
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def agrees(shown: str, value: float) -> bool:
    """A number in a cell is the value as far as it is written out."""
    found = NUMBER.search(RUN.sub("", shown).replace("**", ""))
    assert found, shown
    decimals = len(found[1].partition(".")[2])
    return abs(float(found[1]) - value) <= 0.5 * 10**-decimals * 1.001


def test_ratios_are_those_of_the_runs() -> None:
    header, *rows = table("| wanted | at least |")
    checked = 0
    for label, _, *cells in rows:
        if label not in TARGETS:
            assert not any(re.search(r"\d", cell) for cell in cells), f"{label} is not known here"
            continue
        for place, cell in enumerate(cells, 2):
            if not cell:
                continue
            linked = RUN.search(cell) or RUN.search(header[place])
            assert linked, cell
            (target,) = (each for each in run(linked[1])["targets"] if each["what"] == TARGETS[label])
            assert agrees(cell, target["got"]), f"{label}: {cell}, the run has {target['got']}"
            assert ("**" in cell) <= bool(target["met"]), f"{label}: {cell} is bold and was not met"
            checked += 1
    assert checked > 20


def test_times_of_the_built_in_model_are_those_of_the_run() -> None:
    cells = {each["id"]: each["p50"] for each in run("speed-mini")["cells"] if each["measured"]}
    for label, *shown in table("| safe | unsafe |")[2:]:
        if label not in MINI:
            assert "for each" in label and agrees(shown[0], 1e3 * cells["packed/onnx-int8/16"]), label
            continue
        for answer, cell in zip(("safe", "unsafe"), shown, strict=True):
            assert agrees(cell, 1e3 * cells[f"{MINI[label]}/23/{answer}"]), f"{label}, {answer}: {cell}"


@pytest.mark.parametrize(("name", "precision"), [("speed-mini-fidelity", "int8"), ("speed-mini-fidelity-int4", "int4")])
def test_agreement_is_that_of_the_run(name: str, precision: str) -> None:
    (cell,) = (each for each in run(name)["cells"] if each["id"] == f"fidelity/onnx-{precision}")
    found = re.search(rf"\[\*\*([\d.]+)%\*\*\]\(docs/results/{name}\.json\)", README)
    assert found and agrees(found[1], 100 * cell["p50"])
