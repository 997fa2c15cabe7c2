"""The worker for edgeguard itself: one forward over the whole prompt (level L1), or the guard as applications use it (L2 to L4)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from protocol import Judged, serve  # type: ignore[import-not-found]  # a script's own folder is on its path

from edgeguard import store
from edgeguard.answers import Answers
from edgeguard.backends import background
from edgeguard.backends.base import Backend, Node, Run
from edgeguard.conversation import Conversation
from edgeguard.decoder import decide_many
from edgeguard.guard import Guard
from edgeguard.loading import Parts, load_parts
from edgeguard.prompt import render


class GuardEngine:
    """Options: `backend`, `device`, `level` ("L1" keeps no prefix), `prefix` ("evaluate" does not restore a stored one), `packed`, `own`.

    `own` is "no" where only the runtime's kernels shall be used.
    `packed` is a folder for ONNX weights in the form that is mapped at load; where it holds none, the form is made first.
    """

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """A guard, or its parts for level L1."""
        given: str | Backend = options.get("backend", "auto")
        device = options.get("device", "cpu")
        self._whole = options.get("level") == "L1"
        evaluate, packed = self._whole or options.get("prefix") == "evaluate", options.get("packed")
        if evaluate or packed or "own" in options:
            given = _opened(model, str(given), device, threads, evaluate, Path(packed) if packed else None, own="own" not in options)
        self._parts = load_parts(model, backend=given, device=device, threads=threads)
        parts = self._parts
        self._guard = Guard(parts.backend, parts.tokenizer, parts.profile, parts.identity)
        self._cold = True
        codes = [category.code for category in parts.profile.policy.categories]
        self._answers = Answers.build(parts.profile, codes, parts.tokenizer)
        return facts(parts, model)

    def judge(self, request: Mapping[str, Any]) -> Judged:
        """Rendering and tokens are part of the time, as they are of a caller's."""
        if self._cold:
            self._cold = False
        else:  # the first message is judged at once, further ones as a process that lives on sees them
            background.settled()
        began = time.perf_counter()
        judged = self._judged(request)
        seconds, info = time.perf_counter() - began, self._parts.backend.info
        granted = {"kernel": info.kernel, "fallbacks": list(info.fallbacks)}  # another one than at load once weights are packed
        return replace(judged, seconds=seconds, extra={**judged.extra, "granted": granted})

    def _judged(self, request: Mapping[str, Any]) -> Judged:
        messages = [item["message"] for item in request["items"]]
        threshold = 0.5 if request.get("threshold") is None else float(request["threshold"])
        if self._whole:
            return self._from_nothing(messages, threshold)
        role = request.get("role")
        if len(messages) > 1:
            verdicts = list(self._guard.check_many(messages, role, threshold, batch=len(messages)))
        else:
            verdicts = [self._guard.check(messages[0], role, threshold)]
        return Judged([each.raw for each in verdicts], [each.score for each in verdicts],
                      extra={"passes": max(each.passes for each in verdicts)})

    def _from_nothing(self, messages: list[str], threshold: float) -> Judged:
        """Each prompt in a forward pass of its own, nothing kept from the one before."""
        decisions = []
        backend, run = self._parts.backend, Run()
        for message in messages:
            prompt = render(self._parts.profile, Conversation.of(message))
            ids = [*self._parts.tokenizer.encode(prompt.segments), *self._answers.lead_in]
            node: Node = backend.open(ids, run)
            try:
                decisions += decide_many(backend, [node], self._answers, run, threshold=threshold)
            finally:
                backend.close(node)
        return Judged([each.raw for each in decisions], [each.score for each in decisions],
                      extra={"passes": 1 + max(each.passes for each in decisions)})


def facts(parts: Parts, model: str) -> dict[str, Any]:
    """What was granted, by the backend's own word."""
    info = parts.backend.info
    found = store.resolve(model, ("onnx",) if info.name == "onnx" else ("gguf",))
    digest, cache = "", 0
    if isinstance(found, store.Artifact):
        digest = max(found.manifest.files.values(), key=lambda record: record.size).sha256
        if info.name == "llama":  # allocated at load for the whole context, in half precision
            cache = found.manifest.shape.kv_bytes // 2 * info.context
    return {
        "backend": info.name, "runtime": info.runtime, "device": info.device, "precision": info.precision,
        "threads": info.threads, "kernel": info.kernel, "bytes": found.size, "kv_at_load": cache,
        "model": found.name, "profile": parts.identity.profile, "sha256": digest, "fallbacks": list(info.fallbacks),
    }


def _opened(model: str, backend: str, device: str, threads: int, evaluate: bool, packed: Path | None, *, own: bool) -> Backend:
    """An artifact opened in a way of its own: prefixes evaluated and no cache asked, packed weights mapped, the runtime's kernels."""
    found = store.resolve(model, ("onnx",) if backend == "onnx" else ("gguf",))
    if not isinstance(found, store.Artifact):
        raise ValueError(f"{Path(model).name} has no manifest, so it stores no prefix that could be left out")
    if backend == "onnx":
        from edgeguard.backends import onnx, onnx_session, prepacked

        if packed and prepacked.find(found, packed, onnx_session.build()) is None:
            onnx.make_prepacked(found, packed)
        artifact = replace(found, manifest=replace(found.manifest, prefixes=())) if evaluate else found
        return onnx.OnnxBackend(artifact, device=device, threads=threads, prepacked=packed, own=own)
    from edgeguard.backends.llama import LlamaBackend

    return LlamaBackend(found.weights, device=device, threads=threads)


if __name__ == "__main__":
    serve(GuardEngine())
