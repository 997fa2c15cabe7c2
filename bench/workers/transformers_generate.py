"""transformers' `generate` on a Hugging Face folder, greedy.

Options: `dtype` ("float32" or "bfloat16"), `reuse`: "none" is `generate` as people call it; "prefix" keeps one cache and cuts it
back to the common prefix before every message, as its documentation on caches advises for repeated beginnings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from answers import Clock, size, unsafe_share, versions  # type: ignore[import-not-found]  # a script's own folder is on its path
from protocol import Judged, serve  # type: ignore[import-not-found]

REUSES = ("none", "prefix")


class Generate:
    """One model, as long as the process lives; also what another runtime's model behind the same `generate` is judged with."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Threads are set; attention is what the library chooses."""
        import torch
        from transformers import AutoModelForCausalLM, logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        dtype = str(options.get("dtype", "float32"))
        made = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), local_files_only=True).eval()
        self._begin(model, made, options)
        attention = made.config._attn_implementation  # noqa: SLF001  it has no other name
        return {
            "runtime": versions("transformers", "torch"), "device": str(made.device), "precision": dtype,
            "threads": torch.get_num_threads(), "kernel": f"{attention} attention", "bytes": size(model, ".safetensors"),
            "reuse": self._reuse, "fallbacks": [],
        }

    def judge(self, request: Mapping[str, Any]) -> Judged:
        """Token ids go in, so that no tokenizer is timed."""
        clock, raw, scores = Clock(), [], []
        for item in request["items"]:
            ids = self._torch.tensor([item["ids"]])
            with self._torch.inference_mode(), clock.running():
                made = self._model.generate(
                    ids, attention_mask=self._torch.ones_like(ids), max_new_tokens=request["max_tokens"], do_sample=False,
                    pad_token_id=self._pad, return_dict_in_generate=True, output_logits=True, **self._cache(item))
            raw.append(self._tokenizer.decode(made.sequences[0, ids.shape[1]:], skip_special_tokens=True).strip())
            scores.append(unsafe_share(made.logits[0][0], request["answers"]))
        return Judged(raw, scores, clock.seconds)

    def _begin(self, folder: str, model: Any, options: Mapping[str, Any]) -> None:  # noqa: ANN401  of any runtime
        import torch
        from transformers import AutoTokenizer

        self._torch, self._model, self._reuse = torch, model, str(options.get("reuse", "none"))
        if self._reuse not in REUSES:
            raise ValueError(f"reuse is one of {', '.join(REUSES)}")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ends: int | Sequence[int] = model.generation_config.eos_token_id
        self._pad = ends if isinstance(ends, int) else ends[0]
        self._kept: Any = None
        self._held: list[int] = []

    def _cache(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The one cache, cut back to what this prompt has in common with all others."""
        from transformers import DynamicCache

        if self._reuse == "none":
            return {}
        prefix = item["ids"][: item["prefix"]]
        if self._kept is None or self._held != prefix:
            self._kept, self._held = DynamicCache(), prefix
        elif over := self._kept.get_seq_length() - len(prefix):
            self._kept.crop(-over)
        return {"past_key_values": self._kept}


if __name__ == "__main__":
    serve(Generate())
