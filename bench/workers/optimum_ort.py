"""optimum's `ORTModelForCausalLM` on a folder that its exporter made: transformers' `generate` over ONNX Runtime, greedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from answers import size, versions  # type: ignore[import-not-found]  # a script's own folder is on its path
from protocol import serve  # type: ignore[import-not-found]
from transformers_generate import Generate  # type: ignore[import-not-found]


class OptimumOrt(Generate):  # type: ignore[misc]
    """One model, as long as the process lives; keys and values are kept from token to token, and of nothing between two calls."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The CPU's provider with as many threads as told."""
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(threads)
        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = threads
        made = ORTModelForCausalLM.from_pretrained(
            model, provider="CPUExecutionProvider", session_options=session, use_cache=True, local_files_only=True)
        self._begin(model, made, options)
        return {
            "runtime": versions("optimum-onnx", "onnxruntime", "transformers"), "device": "cpu", "precision": "float32", "threads": threads,
            "kernel": ", ".join(made.providers), "bytes": size(model, ".onnx", ".onnx_data"), "reuse": "none", "fallbacks": [],
        }


if __name__ == "__main__":
    serve(OptimumOrt())
