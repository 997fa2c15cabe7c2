"""Random weights of any Llama shape, made on demand, with which a guard still gives verdicts.

Every weight is a small whole number times a power of two, so that all formats hold the very same weights (see `blocks`).
Speed and memory do not depend on the values; the verdicts mean nothing, but they take the way of true ones:

- the embedding of each token has a share along one direction, of a size drawn for the token, and none for the tokens of the
  prompt's frame; the first layer adds its mean over the text to every token, as one direction of the output space;
- the two answers' rows of the head point along the embedding of the prompt's last token, which makes both likely there, and
  along that direction of the output space, one way and the other: a text's tokens decide, about as often for each answer;
- the rows of what follows in an answer point along the embeddings of what it follows.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.answers import Answers
from edgeguard.architecture import Shape
from edgeguard.bench.blocks import Values, bfloat16
from edgeguard.conversation import Conversation
from edgeguard.errors import InputError, ModelFileError
from edgeguard.profiles import Profile
from edgeguard.prompt import render
from edgeguard.tokenizer import Tokenizer
from edgeguard.weights import EMBEDDING, HEAD, Rows, expected

LLAMA_GUARD_2 = Shape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256, context=8192,
                      rope_theta=500000.0, rms_eps=1e-5, tied=False)
"""From config.json of meta-llama/Meta-Llama-Guard-2-8B."""

CHUNK = 1 << 20
"""Weights drawn together; rows are drawn without those of other chunks."""
GAINS = {
    "layers.0.self_attn.q_proj": 1 / 64,  # next to no scores: the first layer takes the mean over all tokens
    "layers.0.self_attn.o_proj": 4.0,
    "self_attn.o_proj": 1 / 5, "mlp.down_proj": 1 / 6,  # a layer changes little, so that the last token's embedding survives all
}
"""How much larger a matrix makes what goes through it; 1 for those not named. The first that fits is taken."""
EMBEDDING_SCALE = 0.5
NORM_SCALE = 1 / 32
WIDEST = 4
"""Of a token's share along the common direction."""

# both halves of a byte as two numbers: -7 to 7 for matrices, and -3 to 3, the middle ones more often, for embeddings
_HALVES = np.array([[byte & 15, byte >> 4] for byte in range(256)])
EVEN = np.where(_HALVES, _HALVES - 8, 0).astype(np.int8)
PEAKED = ((_HALVES & 3) + (_HALVES >> 2) - 3).astype(np.int8)
SPREAD = 4.183
"""Root mean square of `EVEN`."""


@dataclass(frozen=True)
class Script:
    """What the head is to make likely, by token ids."""

    safe: int
    unsafe: int
    quiet: frozenset[int]
    """Tokens of the prompt's frame and of the answers: no text's verdict depends on them."""
    follows: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """For tokens of answers, what they may come after."""

    @classmethod
    def ask(cls, profile: Profile, tokenizer: Tokenizer) -> Script:
        """As a profile's template and a vocabulary have it."""
        answers = Answers.build(profile, [category.code for category in profile.policy.categories], tokenizer)
        frames = [_frame(profile, tokenizer, assistant) for assistant in (False, True)]
        follows: dict[int, dict[int, None]] = defaultdict(dict)
        safe, unsafe = answers.safe[0], answers.unsafe[0]
        for first in (safe[0], unsafe[0]):
            for frame in frames:
                follows[first][(*frame, *answers.lead_in)[-1]] = None
        for code in answers.first:
            for before, after in pairwise((*unsafe, *answers.line, *code, answers.ends[0])):
                follows[after][before] = None
        for before, after in pairwise((*safe, answers.ends[0])):
            follows[after][before] = None
        quiet = frozenset({*chain.from_iterable(frames), *answers.ids})
        return cls(safe[0], unsafe[0], quiet, {after: tuple(before) for after, before in follows.items()})


def _frame(profile: Profile, tokenizer: Tokenizer, assistant: bool) -> tuple[int, ...]:
    """Ids that two prompts of unlike texts have in common, in order."""
    def prompt(word: str) -> list[int]:
        turns = [{"role": "user", "content": word}, {"role": "assistant", "content": word}, {"role": "user", "content": word}]
        return tokenizer.encode(render(profile, Conversation.of(turns[: 2 if assistant else 3])).segments)

    other = set(prompt("7"))
    return tuple(id_ for id_ in prompt("What?") if id_ in other)


class RandomWeights:
    """`edgeguard.weights.Weights` by shape and seed; nothing is kept but what a script needs.

    With a `script` the weights give verdicts; that needs a head of its own. Raises `InputError` for tied embeddings then.
    """

    def __init__(self, shape: Shape, seed: int = 0, script: Script | None = None) -> None:
        if script is not None and shape.tied:
            raise InputError("The output of this shape is its embedding: random weights of it cannot give verdicts.")
        if shape.hidden % 32 or shape.ffn % 32 or shape.heads * shape.head_dim % 32:
            raise InputError(f"Widths must be multiples of 32, these are {shape.hidden}, {shape.heads * shape.head_dim}, {shape.ffn}.")
        self.shape, self.seed, self.script = shape, seed, script
        self._sizes = expected(shape)

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self._sizes)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A whole tensor."""
        return self.rows(name, slice(None))

    def rows(self, name: str, index: Rows) -> NDArray[np.float32]:
        """Rows of a tensor; others are not made, but those of the same chunks."""
        weights = self.values(name, index).astype(np.float32)
        weights *= np.float32(self.scale(name))
        return weights + 1 if self._vector(name) else weights

    def raw(self, name: str) -> tuple[NDArray[Any], str]:
        """A tensor in bfloat16, which holds it exactly."""
        return bfloat16(self.tensor(name)), "BF16"

    def scale(self, name: str) -> float:
        """The power of two that the values of a tensor are multiplied by."""
        if name == EMBEDDING or self._vector(name):
            return EMBEDDING_SCALE if name == EMBEDDING else NORM_SCALE
        gain = next((gain for part, gain in GAINS.items() if f".{part}." in name), 1.0)
        return float(2.0 ** np.round(np.log2(gain / (SPREAD * np.sqrt(self._size(name)[1])))))

    def values(self, name: str, index: Rows = slice(None)) -> Values:
        """The whole numbers of a tensor's rows, -7 to 7; of a norm's weights those that are scaled and added to 1."""
        rows, *width = self._size(name)
        step = max(1, CHUNK // width[0]) if width else rows
        wanted = np.arange(rows)[index]
        made = np.empty((len(wanted), *width), np.int8)
        for chunk in np.unique(wanted // step):
            places = np.flatnonzero(wanted // step == chunk)
            drawn = self._chunk(name, int(chunk), range(chunk * step, min((chunk + 1) * step, rows)))
            made[_run(places)] = drawn[_run(wanted[places] % step)]
        return made

    def _size(self, name: str) -> tuple[int, ...]:
        if name not in self._sizes:
            raise ModelFileError(f"A model of this shape has no tensor {name}.")
        return self._sizes[name]

    def _vector(self, name: str) -> bool:
        return len(self._size(name)) == 1

    def _chunk(self, name: str, chunk: int, rows: range) -> Values:
        """Some rows that are drawn together."""
        width = self._size(name)[1:]
        values = self._drawn(name, chunk, len(rows) * (width[0] if width else 1), PEAKED if name == EMBEDDING else EVEN)
        values = values.reshape(len(rows), *width)
        if name == EMBEDDING:
            values += self._shares[rows.start : rows.stop, None] * self._common
        elif name == HEAD and self.script:
            for id_ in self.script.follows:
                if id_ in rows:
                    values[id_ - rows.start] = self._answer(self.script, id_, values[id_ - rows.start])
        return values

    def _drawn(self, what: str, part: int, count: int, table: NDArray[np.int8]) -> Values:
        """Numbers that depend on the seed, a name and a part only."""
        bits = np.random.SFC64(np.random.SeedSequence([self.seed, zlib.crc32(what.encode()), part]))
        drawn = np.asarray(bits.random_raw(-(-count // 16)), "<u8").view(np.uint8)
        return table.view(np.int16)[:, 0][drawn].view(np.int8)[:count]

    @cached_property
    def _shares(self) -> Values:
        """Each token's share along the common direction."""
        shares = np.clip(self._drawn("shares", 0, self.shape.vocab, EVEN), -WIDEST, WIDEST)
        if self.script:
            shares[list(self.script.quiet)] = 0
        return shares

    @cached_property
    def _common(self) -> Values:
        """The direction in the embedding: signs."""
        return np.where(self._drawn("direction", 0, self.shape.hidden, EVEN) < 0, -1, 1).astype(np.int8)

    @cached_property
    def _signal(self) -> Values:
        """Signs of what the first layer's attention makes of the common direction."""
        shape, layer = self.shape, "model.layers.0"
        value = self.tensor(f"{layer}.self_attn.v_proj.weight") @ (self.tensor(f"{layer}.input_layernorm.weight") * self._common)
        repeated = np.repeat(value.reshape(shape.kv_heads, -1), shape.heads // shape.kv_heads, 0).ravel()
        return np.where(self.tensor(f"{layer}.self_attn.o_proj.weight") @ repeated < 0, -1, 1).astype(np.int8)

    def _answer(self, script: Script, id_: int, drawn: Values) -> Values:
        """A row of the head that is likely after some tokens; `drawn` is what it would be else."""
        along = self.values(EMBEDDING, np.asarray(script.follows[id_])).sum(0, dtype=np.int16)
        side = {script.unsafe: 1, script.safe: -1}.get(id_)
        if side is not None:
            return np.asarray(np.clip(2 * along, -6, 6) + side * self._signal, np.int8)
        return np.asarray(np.clip(along, -4, 4) + np.clip(drawn, -3, 3), np.int8)


def _run(places: NDArray[np.int64]) -> Rows:
    """As a slice where one place follows the other, which copies several times as fast."""
    first, count = int(places[0]), len(places)
    return slice(first, first + count) if (places == np.arange(first, first + count)).all() else places
