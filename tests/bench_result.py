"""A bench result that was never measured: all its numbers are invented for the tests, by the format of the result file."""

from __future__ import annotations

from typing import Any

from edgeguard.bench.cells import Cell

PEER, BEST, SMALL = "llama-cpp-python q4_k_m", "edgeguard onnx int8", "edgeguard onnx int4"
FACTS = {
    PEER: {"runtime": "llama-cpp-python 0.0.1", "device": "cpu", "precision": "q4_k_m", "bytes": 4_900_000_000, "threads": 2},
    BEST: {"runtime": "onnxruntime 0.0.2", "device": "cpu", "precision": "int8", "bytes": 7_000_000_000, "threads": 2, "kernel": "vnni"},
    SMALL: {"runtime": "onnxruntime 0.0.2", "device": "cpu", "precision": "int4", "bytes": 4_500_000_000, "threads": 2},
}
LENGTHS = {23: 1.0, 128: 1.9, 512: 6.0, 2048: 25.0, 8000: 130.0}


def cell(id_: str, contender: str, middle: float | None, unit: str = "s", extra: dict[str, Any] | None = None, reason: str | None = None,
         **params: object) -> Cell:
    samples = () if middle is None else tuple(middle * factor for factor in (0.96, 0.98, 1.0, 1.03, 1.09))
    return Cell(id_, id_.partition("/")[0], contender, unit, params, samples, FACTS.get(contender, {}), extra or {}, reason)


def cells() -> list[Cell]:
    def at_23(id_: str, contender: str, middle: float | None, **more: Any) -> Cell:
        told = {"prompt_tokens": 214, "usd_per_million_tokens": (middle or 0) * 0.025, "gmacs": 99.0, "share_of_int8_ceiling": 0.846}
        level = {"level": id_.split("/")[1]} if id_.startswith("ladder") else {}
        start = "cold" if id_.endswith("first") else "steady"
        return cell(id_, contender, middle, extra=told, tokens=23, answer="safe", start=start, **level, **more)

    return [
        at_23("ladder/L0/gguf-q4_k_m/23/first", PEER, 26.2, pack=1),
        at_23("ladder/L0/gguf-q4_k_m/23/safe", PEER, 10.3, pack=1),
        at_23("ladder/L1/onnx-int8/23/safe", f"{BEST}, nothing kept", 7.7, pack=1),
        at_23("ladder/L2/onnx-int8/23/first", BEST, 2.9, pack=1),
        at_23("ladder/L2/onnx-int8/23/safe", BEST, 2.41, pack=1),
        at_23("ladder/L2/onnx-int4/23/safe", SMALL, 5.1, pack=1),
        at_23("ladder/L3/onnx/23/safe", BEST, 2.41, pack=1),
        at_23("ladder/L4/onnx/23/safe", BEST, 2.2, pack=16),
        at_23("ladder/L4/llama/23/safe", "edgeguard llama q4_k_m", None, reason="llama.cpp has no room for <16> & more messages", pack=16),
        at_23("peers/llama/23/safe", PEER, 10.1),
        at_23("peers/onnxruntime-genai/23/safe", "onnxruntime-genai int4, builder's defaults, rewind to the prefix", 7.2),
        at_23("peers/openvino/23/safe", "openvino-genai int8", None, reason="needs 21 GB of memory, 16 are free"),
        *(cell(f"length/{name}/{tokens}/{answer}", contender, base * factor * longer, tokens=tokens, answer=answer)
          for name, contender, base in (("int8", BEST, 2.4), ("int4", SMALL, 5.0), ("llama", "edgeguard llama q4_k_m", 10.0))
          for tokens, factor in LENGTHS.items() for answer, longer in (("safe", 1.0), ("unsafe", 1.4))),
        cell("cold/onnx-int8/stored", BEST, 13.5, what="process start to first verdict", prefix="stored"),
        cell("cold/onnx-int8/evaluated", BEST, 19.0, what="process start to first verdict", prefix="evaluated"),
        cell("cold/ladder-L0-gguf-q4_k_m/load", PEER, 0.9, what="load", level="L0"),
        *(cell(f"packed/onnx-int8/{pack}", BEST, 2.5 / (1 + pack / 200), pack=pack, tokens=23, answer="safe", extra={"prompt_tokens": 214})
          for pack in (1, 4, 16, 64)),
        cell("memory/onnx-int8/load", BEST, 7.4e9, "B", when="load", what="anonymous",
             extra={"resident": 14_300_000_000, "anonymous": 7_400_000_000}),
        cell("memory/llama/load", PEER, 0.6e9, "B", when="load", what="anonymous",
             extra={"resident": 5_500_000_000, "anonymous": 600_000_000}),
        cell("ceiling/int8/onnxruntime/qkv", "onnxruntime", 202.0, "GMAC/s", what="int8 gemm",
             matrix="qkv", kind="int8", shape="77 x 4096 x 6144"),
        cell("ceiling/int8/torch/qkv", "torch", 171.0, "GMAC/s", what="int8 gemm",
             matrix="qkv", kind="int8", shape="77 x 4096 x 6144"),
        cell("ceiling/float/onnxruntime/qkv", "onnxruntime-float", 62.0, "GMAC/s", what="float gemm", matrix="qkv", kind="float",
             shape="77 x 4096 x 6144"),
        cell("ceiling/read", "memory, read", 20.6, "GB/s"),
        cell("fidelity/onnx-int8", BEST, 0.995, "share", against="onnx-fp32",
             extra={"unsafe_to_safe": 2, "safe_to_unsafe": 1, "drift": 0.0071, "rows": 4156}),
        cell("fidelity/onnx-int4", SMALL, 0.978, "share", against="onnx-fp32",
             extra={"unsafe_to_safe": 60, "safe_to_unsafe": 31, "drift": 0.021, "rows": 4156}),
    ]


def result(made: list[Cell] | None = None, **changed: object) -> dict[str, Any]:
    return {
        "bench": "speed", "format": 1, "suite": "full", "created": "2000-01-01T00:00:00+00:00", "edgeguard": "0.0.0",
        "machine": {
            "cpu": "Invented Processor 9000", "flags": ["avx2", "avx512_vnni"], "arch": "x86_64", "cores": 2, "threads": 2,
            "memory_bytes": 16_000_000_000, "os": "Linux-0", "python": "3.10.0", "packages": {"onnxruntime": "0.0.2", "numpy": "0.0.3"},
        },
        "model": {
            "name": "Invented-8B", "profile": "llama-guard-2", "random": True, "shape": {"layers": 32, "hidden": 4096},
            "artifacts": [{"label": "int8", "kind": "onnx", "precision": "int8", "bytes": 7_000_000_000, "sha256": "ab" * 32}],
        },
        "cost": {"watts": 65.0, "price": 0.3, "hosted": 0.2},
        "cells": [each.to_dict() for each in (cells() if made is None else made)],
        "targets": [
            {"what": "L0 cold over the best path", "wanted": ">= 10", "got": 10.87, "met": True,
             "from": ["ladder/L0/gguf-q4_k_m/23/first", "ladder/L3/onnx/23/safe"], "note": ""},
            {"what": "L0 steady over the best path", "wanted": ">= 5", "got": 4.27, "met": False,
             "from": ["ladder/L0/gguf-q4_k_m/23/safe", "ladder/L3/onnx/23/safe"], "note": "noise of 2%"},
            {"what": "openvino over the best path", "wanted": ">= 1", "got": None, "met": None,
             "from": ["peers/openvino/23/safe"], "note": ""},
        ],
        **changed,
    }
