"""onnxruntime-genai on a folder that its model builder made: the generator is rewound to the common prefix between messages.

Options: `context` (tokens of the cache, which is allocated at once), `precision`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from answers import Clock, size, unsafe_share, versions  # type: ignore[import-not-found]  # a script's own folder is on its path
from protocol import Judged, serve  # type: ignore[import-not-found]

CONTEXT = 8192


class OnnxRuntimeGenai:
    """One generator, as long as the process lives."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Provider and threads are set in the folder's configuration, as it is read."""
        import numpy as np
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        self._array: Any = lambda ids: np.asarray(ids, np.int32)
        config = og.Config(model)
        config.clear_providers()  # the CPU's
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=int(options.get("context", CONTEXT)), do_sample=False)
        self._generator = og.Generator(self._model, parameters)
        self._held: list[int] = []  # the prefix that the generator can be rewound to
        return {
            "runtime": versions("onnxruntime-genai", "onnxruntime"), "device": self._model.device_type.lower(),
            "precision": str(options.get("precision", "int4")), "threads": threads, "kernel": "MatMulNBits",
            "bytes": size(model, ".onnx", ".data"), "reuse": "rewind_to", "fallbacks": [],
        }

    def judge(self, request: Mapping[str, Any]) -> Judged:
        """Token ids go in, so that no tokenizer is timed."""
        clock, raw, scores = Clock(), [], []
        for item in request["items"]:
            ids, prefix = item["ids"], item["prefix"]
            with clock.running():
                kept = prefix if self._held == ids[:prefix] else 0
                self._generator.rewind_to(kept)
                self._generator.append_tokens(self._array(ids[kept:]))
            scores.append(unsafe_share(self._generator.get_logits()[0, -1], request["answers"]))
            with clock.running():
                said = self._generate(request["max_tokens"])
            self._held = ids[:prefix]
            raw.append(self._tokenizer.decode(self._array(said)).strip())
        return Judged(raw, scores, clock.seconds)

    def _generate(self, most: int) -> list[int]:
        """Until the end token, which is not given back, or `most` tokens."""
        said: list[int] = []
        while len(said) < most:
            self._generator.generate_next_token()
            if self._generator.is_done():
                break
            said.append(int(self._generator.get_next_tokens()[0]))
        return said


if __name__ == "__main__":
    serve(OnnxRuntimeGenai())
