"""The numbers of a Llama model that every room needs: one record, read from `config.json` or GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeguard.errors import ModelFileError

# far beyond every Llama, and small enough to count with
MOST = {"layers": 1 << 10, "hidden": 1 << 18, "heads": 1 << 12, "kv_heads": 1 << 12, "head_dim": 1 << 12, "ffn": 1 << 20,
        "vocab": 1 << 24, "context": 1 << 24}
MOST_REAL = 1 << 53
CONFIG = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
          "ffn": "intermediate_size", "vocab": "vocab_size", "context": "max_position_embeddings", "rms_eps": "rms_norm_eps",
          "tied": "tie_word_embeddings"}
"""What config.json calls a field; others have one name."""
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""Numbers of Llama 3.1's scaling of RoPE."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama decoder (RMSNorm, RoPE, GQA, SwiGLU, no biases)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    """Positions the model was made for."""
    rope_theta: float
    rms_eps: float
    tied: bool
    """The output projection is the embedding."""
    rope_scaling: Mapping[str, Any] | None = None
    """Llama 3.1 scaling as in config.json (`rope_type` "llama3" only), or None."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """From a Hugging Face `config.json`; raises `ModelFileError` for what is not a plain Llama decoder."""
        if config.get("model_type") != "llama":
            raise ModelFileError(f"This is a {config.get('model_type')!r} model; edgeguard reads 'llama' models only.")
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise ModelFileError("The model has biases in its linear layers, which Llama Guard models do not have.")
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            # transformers 5 moved the RoPE numbers into one mapping
            rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
            theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind not in ("default", "llama3"):
                raise ValueError(f"RoPE scaling of type {kind!r} is not supported, only 'llama3'.")
            shape = cls(
                layers=config["num_hidden_layers"], hidden=hidden, heads=heads, kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or _head_dim(hidden, heads), ffn=config["intermediate_size"], vocab=config["vocab_size"],
                context=config["max_position_embeddings"], rope_theta=theta, rms_eps=config["rms_norm_eps"],
                tied=config.get("tie_word_embeddings") or False, rope_scaling=rope if kind == "llama3" else None,
            )
            shape.check(CONFIG)
        except KeyError as error:
            raise ModelFileError(f"config.json lacks {error}.") from error
        except (TypeError, ValueError) as error:
            raise ModelFileError(f"config.json is not that of a Llama that edgeguard reads: {error}") from error
        return shape

    def check(self, names: Mapping[str, str] | None = None) -> None:
        """Raises `ValueError` for values that no Llama has; `names` are those of fields where the numbers come from."""
        told = names or {}
        for name, most in MOST.items():
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
                raise ValueError(f"{told.get(name, name)} is {repr(number)[:40]}; whole numbers from 1 to {most} are possible.")
        for name in ("rope_theta", "rms_eps"):
            real = getattr(self, name)
            if not _is_positive(real):
                raise ValueError(f"{told.get(name, name)} is {repr(real)[:40]}; a positive number is needed.")
        if not isinstance(self.tied, bool):
            raise ValueError(f"{told.get('tied', 'tied')} must be true or false.")
        scaling: object = self.rope_scaling
        stretches = isinstance(scaling, Mapping) and all(_is_positive(scaling.get(name)) for name in SCALING)
        if scaling is not None and not stretches:
            raise ValueError(f"rope_scaling lacks one of {', '.join(SCALING)}, or holds no positive number there.")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} heads of keys.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest; `Shape(**shape.to_dict())` gives the same shape."""
        return asdict(self)

    @property
    def parameters(self) -> int:
        """Number of weights, embeddings included."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one token in float32."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 4


def _head_dim(hidden: object, heads: object) -> int:
    """The width of a head where it is not told; 0 where its parts are no numbers, which are refused by their names."""
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else 0


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MOST_REAL  # NaN is in no range
