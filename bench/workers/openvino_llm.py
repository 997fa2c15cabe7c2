"""openvino-genai's `LLMPipeline` on a GGUF or on a folder that optimum-intel exported, with prefix caching.

Its paged attention keeps what prompts have in common in blocks of 32 tokens. Activations are quantised to 8 bits and keys and
values kept in 8 bits, which is what the library does by itself.
Options: `context` (tokens that the cache holds), `precision` (what the file is).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from answers import Clock, size, versions  # type: ignore[import-not-found]  # a script's own folder is on its path
from protocol import Judged, serve  # type: ignore[import-not-found]

CONTEXT = 8192
BLOCK = 32  # tokens of a block of the paged cache on a CPU


class OpenVinoLlm:
    """One pipeline, as long as the process lives."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """A scheduler's configuration selects the paged attention, the only one that caches prefixes."""
        import numpy as np
        import openvino
        import openvino_genai as genai

        self._tensor: Any = lambda ids: openvino.Tensor(np.asarray([ids], np.int64))
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.num_kv_blocks = -(-int(options.get("context", CONTEXT)) // BLOCK)
        self._pipeline = genai.LLMPipeline(model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._ends = {*self._pipeline.get_generation_config().stop_token_ids, self._tokenizer.get_eos_token_id()}
        place = Path(model)
        return {
            "runtime": versions("openvino-genai", "openvino"), "device": "cpu", "precision": str(options.get("precision", "")),
            "threads": threads, "kernel": "paged attention", "bytes": size(place) if place.is_file() else size(place, ".bin", ".xml"),
            "reuse": f"prefix caching, blocks of {BLOCK}", "fallbacks": [],
        }

    def judge(self, request: Mapping[str, Any]) -> Judged:
        """Token ids go in, so that no tokenizer is timed. The library gives no logits."""
        clock, raw = Clock(), []
        for item in request["items"]:
            with clock.running():
                made = self._pipeline.generate(
                    self._tensor(item["ids"]), max_new_tokens=request["max_tokens"], do_sample=False, apply_chat_template=False)
            said = [token for token in made.tokens[0] if token not in self._ends]
            raw.append(self._tokenizer.decode([said])[0].strip())
        return Judged(raw, seconds=clock.seconds)


if __name__ == "__main__":
    serve(OpenVinoLlm())
