"""The tables of results in the README and in docs/results.md say what the stored runs hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edgeguard.bench.cells import Cell
from edgeguard.bench.result import agreement

ROOT = Path(__file__).parents[1]
SHOWN = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/results.md"))
RUN = re.compile(r"\((?:docs/)?results/([a-z0-9-]+)\.json\)")
NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*(x|GiB|ms|s|GB|%|)")
SIZES = {"s": 1.0, "ms": 1e-3, "GB": 1e9, "%": 0.01, "x": 1.0, "GiB": 1.0, "": 1.0}
"""What a unit stands for in a run, whose targets have the unit of the wish."""

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
CONTENDERS = {
    "transformers, bf16": "peers/transformers-bf16",
    "transformers, fp32": "peers/transformers-fp32",
    "optimum ORTModelForCausalLM, fp32": "peers/optimum-fp32",
    "llama-cpp-python, `create_completion`, q4_k_m": "ladder/L0/gguf-q4_k_m",
    "llama-cpp-python, `create_completion`, q8_0": "ladder/L0/gguf-q8_0",
    "llama-cpp-python, `create_completion`, q4_0": "peers/llama-cpp-python-q4_0",
    "openvino-genai, GGUF q4_k_m, prefix caching": "peers/openvino-q4_k_m",
    "openvino-genai, GGUF q8_0, prefix caching": "peers/openvino-q8_0",
    "onnxruntime-genai, int4, rewound to the prefix": "peers/onnxruntime-genai-int4",
    "edgeguard, llama backend, q4_k_m": "ladder/L2/gguf-q4_k_m",
    "edgeguard, llama backend, q4_0": "ladder/L2/gguf-q4_0",
    "edgeguard, onnx backend, int4": "ladder/L2/onnx-int4",
    "edgeguard, onnx backend, int8": "ladder/L2/onnx-int8",
}
"""Rows of the tables of times, and the cells they are of."""


def run(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8")))


def table(words: str) -> list[list[str]]:
    """The cells of the table whose header holds these words, header first."""
    lines = SHOWN.split("\n")
    start = next(place for place, line in enumerate(lines) if line.startswith("|") and words in line)
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def agrees(shown: str, value: float, unit: str = "") -> bool:
    """A number in a cell has this unit and is the value as far as it is written out."""
    found = NUMBER.search(RUN.sub("", shown).replace("**", ""))
    assert found and (not unit or found[2] == unit), shown
    decimals = len(found[1].partition(".")[2])
    return abs(float(found[1]) - value / SIZES[found[2]]) <= 0.5 * 10**-decimals * 1.001


def test_ratios_are_those_of_the_runs() -> None:
    header, *rows = table("| wanted | at least |")
    checked = 0
    for label, wish, *cells in rows:
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
            assert agrees(wish, float(NUMBER.search(target["wanted"])[1])), f"{label}: {wish} was wanted"  # type: ignore[index]
            assert ("**" in cell) <= bool(target["met"]), f"{label}: {cell} is bold and was not met"
            checked += 1
    assert checked > 20


def test_times_at_8b_are_those_of_the_run() -> None:
    cells = {each["id"]: each for each in run("speed-8b-amx")["cells"] if each["measured"]}
    for label, first, further, size in table("| first call | further messages |")[2:]:
        cell = cells[f"{CONTENDERS[label]}/23/first"]
        assert agrees(first, cell["p50"], "s") and agrees(size, cell["facts"]["bytes"], "GB"), label
        assert agrees(further, cells[f"{CONTENDERS[label]}/23/safe"]["p50"], "s"), label


def test_figures_of_the_built_in_model_are_those_of_the_run() -> None:
    cells = {each["id"]: each for each in run("speed-mini")["cells"] if each["measured"]}
    for label, safe, unsafe, same in table("| safe | unsafe |")[2:]:
        if label not in CONTENDERS:
            assert "16 in a pass" in label and agrees(safe, cells["packed/onnx-int8/16"]["p50"], "ms"), label
            continue
        times = [cells[f"{CONTENDERS[label]}/23/{answer}"] for answer in ("safe", "unsafe")]
        assert all(agrees(cell, each["p50"], "ms") for cell, each in zip((safe, unsafe), times, strict=True)), label
        held = agreement([Cell.from_dict(each) for each in cells.values()], Cell.from_dict(times[0]))
        assert held and agrees(same, held.p50 or 0.0, "%"), f"{label}: {same}"
    found = re.search(r"takes (\d+ ms) for a safe verdict on the machine with AMX, where transformers takes (\d+ ms)", SHOWN)
    assert found
    for told, cell in zip(found.groups(), ("ladder/L2/onnx-int8/23/safe", "peers/transformers-fp32/23/safe"), strict=True):
        assert agrees(told, cells[cell]["p50"], "ms")
    sentences = {"packed 16": r"takes ([\d.]+) of a single one", "transformers fp32": r"transformers takes ([\d.]+) times as long"}
    for what, shown in sentences.items():
        (target,) = (each for each in run("speed-mini")["targets"] if each["what"].startswith("mini") and what in each["what"])
        found = re.search(shown, SHOWN)
        assert found and agrees(found[1], target["got"]), what


def test_fidelity_is_that_of_the_run() -> None:
    cells = {each["id"]: each for each in run("speed-mini-fidelity")["cells"] if each["measured"] and each["group"] == "fidelity"}
    targets = {each["what"]: each for each in run("speed-mini-fidelity")["targets"]}
    rows = table("| same verdict |")[2:]
    assert {f"fidelity/{label.replace(' ', '-')}" for label, *_ in rows} == set(cells)
    for label, wish, same, to_safe, to_unsafe, drift in rows:
        cell = cells[f"fidelity/{label.replace(' ', '-')}"]
        numbers, target = cell["extra"], targets[f"mini, {cell['params']['precision']}: verdicts that agree with full precision"]
        assert numbers["rows"] == 4156 and agrees(wish, float(NUMBER.search(target["wanted"])[1]), "%")  # type: ignore[index]
        assert agrees(same, cell["p50"], "%") and ("**" in same) <= bool(target["met"]), label
        assert (int(to_safe), int(to_unsafe)) == (numbers["unsafe_to_safe"], numbers["safe_to_unsafe"])
        assert agrees(drift, numbers["drift"]), label


def test_the_run_with_our_own_kernel_is_told_as_it_was() -> None:
    found = re.search(r"speed-8b-amx-own\.json\)\): ([\d.]+)x, ([\d.]+)x, and unsafe over safe ([\d.]+)\.", SHOWN)
    assert found
    got = {each["what"]: each["got"] for each in run("speed-8b-amx-own")["targets"]}
    names = ("llama-cpp-python's first call over edgeguard", "its steady stream over edgeguard", "unsafe with one code over safe")
    for told, name in zip(found.groups(), names, strict=True):
        assert agrees(told, got[TARGETS[name]]), f"{name}: {told}"


def test_seconds_on_avx2_are_those_of_the_run() -> None:
    found = re.search(r"takes ([\d.]+) s in int4, ([\d.]+) s with ONNX Runtime's; in int8 ([\d.]+) s\.", SHOWN)
    loads = re.search(r"int4 loads in (\d+) s, with ONNX Runtime's kernel in (\d+) s", SHOWN)
    assert found and loads
    cells = {each["id"]: each for each in run("speed-8b-avx2")["cells"] if each["measured"]}
    for told, label in zip(found.groups(), ("onnx-int4", "onnx-int4-runtime", "onnx-int8"), strict=True):
        cell = cells[f"ladder/L2/{label}/23/safe"]
        assert agrees(told, cell["p50"]) and ("edgeguard" in cell["facts"]["kernel"]) != label.endswith("runtime")
    for told, label in zip(loads.groups(), ("onnx-int4", "onnx-int4-runtime"), strict=True):
        assert agrees(told, cells[f"cold/ladder-L2-{label}/load"]["p50"])


def test_what_operators_between_products_gain_is_that_of_the_run() -> None:
    shown = r"a safe message takes (\d+) ms with them and (\d+) ms without, transformers ([\d.]+) times as long as with them"
    found = re.search(shown, SHOWN)
    assert found
    cells = {each["id"]: each for each in run("speed-mini-avx2")["cells"] if each["measured"]}
    ours, plain = (cells[f"ladder/L2/onnx-int8{end}/23/safe"] for end in ("", "-runtime"))
    assert ours["facts"]["kernel"].endswith(", fused") and "fused" not in plain["facts"]["kernel"]
    for told, cell in zip(found.groups()[:2], (ours, plain), strict=True):
        assert agrees(f"{told} ms", cell["p50"], "ms")
    assert agrees(found[3], cells["peers/transformers-fp32/23/safe"]["p50"] / ours["p50"])
