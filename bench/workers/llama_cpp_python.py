"""llama-cpp-python as its documentation has it: `Llama(...).create_completion` on the prompt's text, greedy, the text read afterwards.

Options: `context` (tokens), `precision` (what the file is, since the library does not say), `reuse`:
"kept" is the library's way, which keeps the longest beginning that a prompt shares with the one before; "cache" adds its
`LlamaRAMCache`; "state" saves the state behind the common prefix once and restores it before every message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from answers import size, unsafe_share, versions  # type: ignore[import-not-found]  # a script's own folder is on its path
from protocol import Judged, serve  # type: ignore[import-not-found]

CONTEXT = 8192  # what a guard model's caller sets; the library's own default of 512 would refuse longer messages
REUSES = ("kept", "cache", "state")


class LlamaCppPython:
    """One `Llama` object, as long as the process lives."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Threads are set, since half the cores are the default; no logits are kept but the last row's, which is the default."""
        import llama_cpp

        self._native, self._reuse = llama_cpp, str(options.get("reuse", "kept"))
        self._state: Any = None
        if self._reuse not in REUSES:
            raise ValueError(f"reuse is one of {', '.join(REUSES)}")
        context = int(options.get("context", CONTEXT))
        wanted = options.get("device", "cpu") != "cpu"
        gpu = wanted and llama_cpp.llama_supports_gpu_offload()
        self._llama: Any = llama_cpp.Llama(
            model, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_gpu_layers=-1 if gpu else 0, verbose=False)
        if self._reuse == "cache":
            self._llama.set_cache(llama_cpp.LlamaRAMCache())
        features = llama_cpp.llama_print_system_info().decode().strip()
        return {
            "runtime": versions("llama-cpp-python"), "device": "gpu" if gpu else "cpu", "precision": str(options.get("precision", "")),
            "threads": threads, "kernel": features, "bytes": size(model), "context": context, "reuse": self._reuse,
            "fallbacks": ["the CPU: this build offers no GPU"] if wanted and not gpu else [],
        }

    def judge(self, request: Mapping[str, Any]) -> Judged:
        """One completion for each item. Reading a few numbers of the first row of logits is part of the time; it takes microseconds."""
        raw, scores = [], []
        for item in request["items"]:
            if self._reuse == "state":
                self._restore(item["ids"][: item["prefix"]])
            first: list[float] = []
            made = self._llama.create_completion(
                item["text"], max_tokens=request["max_tokens"], temperature=0.0,
                stopping_criteria=self._native.StoppingCriteriaList([self._looks_at(first, request["answers"])]))
            raw.append(made["choices"][0]["text"].strip())
            scores.append(first[0] if first else None)
        return Judged(raw, scores)

    def _looks_at(self, first: list[float], answers: Mapping[str, Sequence[int]]) -> Callable[[Any, Any], bool]:
        """A criterion that never stops anything; it is called after each token, while the row it was chosen from still stands."""
        def goes_on(_tokens: object, _logits: object) -> bool:
            if not first:
                first.append(unsafe_share(self._native.llama_get_logits_ith(self._llama.ctx, -1), answers))
            return False

        return goes_on

    def _restore(self, prefix: Sequence[int]) -> None:
        if self._state is None:
            self._llama.reset()
            self._llama.eval(prefix)
            self._state = self._llama.save_state()
        else:
            self._llama.load_state(self._state)


if __name__ == "__main__":
    serve(LlamaCppPython())
