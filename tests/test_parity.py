"""Random tiny Llama Guard 2 models end to end: prompt, prefix, passes and codes equal what transformers decodes freely."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import Guard, profiles
from edgeguard.architecture import Shape
from edgeguard.backends.reference import ReferenceBackend
from edgeguard.bench.texts import messages
from edgeguard.conversation import Conversation
from edgeguard.prompt import render
from edgeguard.tokenizer import JsonTokenizer
from edgeguard.verdict import ModelIdentity
from edgeguard.weights import widen

SAFE, UNSAFE, LINE, S, NEXT, END, BRACKET = 19193, 39257, 198, 50, 21861, 128001, 60
CODES = [*range(16, 25), 605, 806]
FORM = re.compile(r"safe|unsafe\n(S([1-9]|1[01]))(,S([1-9]|1[01]))*")
MODELS = 120


class Held:
    """A model of transformers as `Weights`."""

    def __init__(self, model: Any) -> None:
        self.shape = Shape.from_config(model.config.to_dict())
        self._state = model.state_dict()

    def names(self) -> list[str]:
        return sorted(self._state)

    def raw(self, name: str) -> tuple[NDArray[Any], str]:
        return self._state[name].numpy(), "F32"

    def tensor(self, name: str) -> NDArray[np.float32]:
        return widen(*self.raw(name))


def teach_to_speak(model: Any, seed: int) -> None:
    """A random head that prefers what an answer goes on with, so that many of the free answers are well-formed."""
    import torch

    torch.manual_seed(seed)
    known = [SAFE, UNSAFE, LINE, S, NEXT, END, BRACKET, *CODES]
    after = {LINE: [UNSAFE], S: [LINE], END: [SAFE, *CODES], NEXT: CODES, SAFE: [BRACKET], UNSAFE: [BRACKET]}
    after |= {code: [S, NEXT] for code in CODES}
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    with torch.no_grad():
        embedding[known] = torch.randn(len(known), 64)
        unit = {token: embedding[token] / embedding[token].norm() for token in known}
        head.zero_()
        for token, befores in after.items():
            head[token] = 3 * sum(unit[before] for before in befores) + 0.4 * torch.randn(64)


def well_formed(answer: str) -> bool:
    codes = answer.partition("\n")[2].split(",")
    return bool(FORM.fullmatch(answer)) and len(set(codes)) == len(codes)


def test_answers_equal_free_greedy_decoding_of_random_models(tiny_llama: Callable[[str], Path]) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama("plain"), dtype=torch.float32)
    tokenizer = JsonTokenizer.load(tiny_llama("plain") / "tokenizer.json")
    profile = profiles.get("llama-guard-2")
    identity = ModelIdentity("random", profile.name, "fp32", "", "reference", "numpy", "cpu")
    said: list[str] = []
    for seed, text in enumerate([*messages("harmless", MODELS // 2, 1), *messages("harmful", MODELS // 2, 1)]):
        teach_to_speak(model, seed)
        ids = torch.tensor([tokenizer.encode(render(profile, Conversation.of(text)).segments)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=28,
                             eos_token_id=END, pad_token_id=END)
        answer = tokenizer.decode([token for token in out[0, ids.shape[1]:].tolist() if token != END])
        if well_formed(answer):
            said.append(answer)
            with Guard(ReferenceBackend(Held(model)), tokenizer, profile, identity) as guard:
                assert guard.check(text).raw == answer
    assert len(said) >= MODELS // 4, "the models do not speak in answers"
    assert len(set(said)) >= 12 and "safe" in said
    assert any("," in answer for answer in said), "no answer lists two codes"
