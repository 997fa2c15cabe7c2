"""What contenders are given: messages of a wanted length, or rows, as a model's own prompts, in text and in token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeguard.answers import Answers
from edgeguard.bench import texts
from edgeguard.bench.artifacts import Measured
from edgeguard.conversation import Conversation
from edgeguard.guard import ANSWER_ROOM
from edgeguard.prefix import role_prefixes
from edgeguard.prompt import render
from edgeguard.tokenizer import JsonTokenizer

KIND = {"safe": "harmless", "unsafe": "harmful"}
Item = dict[str, Any]


class Prompts:
    """Prompts of one model; those of a wanted length are its judged user's, the same ones for the same seed."""

    def __init__(self, model: Measured, seed: int = 0) -> None:
        self._profile, self._seed = model.profile, seed
        self._tokenizer = JsonTokenizer.load(model.any.tokenizer)
        self._answers = Answers.build(self._profile, [each.code for each in self._profile.policy.categories], self._tokenizer)
        self._prefixes = role_prefixes(self._profile, self._tokenizer)
        self._room = min(model.shape.context, self._profile.context) - ANSWER_ROOM
        self._made: dict[tuple[str, int], list[str]] = {}

    @property
    def answers(self) -> dict[str, list[int]]:
        """Ids that the two answers begin with."""
        return {"safe": [ids[0] for ids in self._answers.safe], "unsafe": [ids[0] for ids in self._answers.unsafe]}

    @property
    def prefix(self) -> int:
        """Tokens that every prompt begins with."""
        return len(self._prefixes["user"])

    @property
    def around(self) -> int:
        """Tokens of a prompt that are not the text's, up to one that a border may cost."""
        return len(self._item(Conversation.of("Hello."))["ids"]) - self._count("Hello.")

    def size(self, tokens: int) -> int:
        """As many tokens of text as were asked for, or what the context still holds."""
        return min(tokens, self._room - self.around - 1)

    def items(self, answer: str, tokens: int, start: int, number: int) -> list[Item]:
        """Distinct prompts `start` to `start + number` of those whose text has `tokens` tokens; `answer` is what they ask for."""
        key = answer, self.size(tokens)
        if len(self._made.get(key, ())) < start + number:
            self._made[key] = texts.of_tokens(self._count, KIND[answer], key[1], start + number, self._seed)
        return [{**self._item(Conversation.of(text)), "message": text} for text in self._made[key][start: start + number]]

    def judged(self, conversation: Conversation) -> Item:
        """The prompt of any conversation, with its messages as edgeguard takes them."""
        messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
        return {**self._item(conversation), "message": messages}

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode_text(text))

    def _item(self, conversation: Conversation) -> Item:
        prompt = render(self._profile, conversation)
        text = prompt.text
        for token in self._profile.begin:  # libraries that take text add their own
            text = text.removeprefix(token)
        ids = [*self._tokenizer.encode(prompt.segments), *self._answers.lead_in]
        return {"text": text + self._profile.lead_in, "ids": ids, "prefix": len(self._prefixes[conversation.role])}


def accepted(answer: str) -> Callable[[str], bool]:
    """Whether a raw answer is of the kind that a cell speaks of: `safe`, or `unsafe` with exactly one code."""
    def one_code(raw: str) -> bool:
        verdict, _, codes = raw.strip().partition("\n")
        return verdict == "unsafe" and len(codes.split(",")) == 1 and bool(codes)

    return one_code if answer == "unsafe" else lambda raw: raw.strip() == "safe"
