"""Text to ids and back, by a `tokenizer.json` or by llama.cpp's own vocabulary; knows no model and no backend.

Both give the same ids, but for letters and digits that Unicode 16 added and llama.cpp does not know yet. Text is encoded as
text whatever it spells: control tokens come only from `Control` segments, by exact look-up, and a vocabulary whose own
control tokens would be read out of text is refused when it is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgeguard.errors import ModelFileError, ModelMismatchError, RuntimeMissingError
from edgeguard.prompt import Control, Prompt, Segment, Text

if TYPE_CHECKING:
    import tokenizers


class Tokenizer(Protocol):
    """Text to ids; safe to share between threads."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of the vocabulary, by which caches of prefixes are told apart."""
        ...

    def encode(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of a prompt; neighbouring texts are encoded as one, so that the cut between them leaves no trace."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; never a control token, and none is added in front or behind."""
        ...

    def control(self, token: str) -> int:
        """Id of the control token of exactly that name; raises `ModelMismatchError` if there is none."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        ...


class _Segments:
    """`encode` and `control`, the same for both vocabularies."""

    _controls: dict[str, int]

    def encode_text(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of a prompt; neighbouring texts are encoded as one, so that the cut between them leaves no trace."""
        ids: list[int] = []
        for kind, run in groupby(segments, type):
            if kind is Control:
                ids += [self.control(segment.token) for segment in run if isinstance(segment, Control)]
            else:
                ids += self.encode_text("".join(segment.text for segment in run if isinstance(segment, Text)))
        return ids

    def control(self, token: str) -> int:
        """Id of the control token of exactly that name; raises `ModelMismatchError` if there is none."""
        if token not in self._controls:
            raise ModelMismatchError(f"The tokenizer has no control token {token!r}; model and profile do not belong together.")
        return self._controls[token]

    def _prove(self, path: Path) -> None:
        """Raises `ModelMismatchError` if the name of a control token, met in text, would become that token."""
        ids = set(self._controls.values())
        for token in self._controls:
            if ids.intersection(self.encode_text(token)) or ids.intersection(self.encode_text(f"a {token}b{token}\n")):
                raise ModelMismatchError(
                    f"{path} reads {token!r} in plain text as a control token, so a text could forge the prompt. "
                    "Mark that token as special (in a GGUF: of type CONTROL) and convert the model again."
                )


class JsonTokenizer(_Segments):
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, sha256: str) -> None:
        """Takes the tokenizer over; use `load`."""
        tokenizer.encode_special_tokens = True  # special tokens in text stay text
        tokenizer.no_padding()
        tokenizer.no_truncation()
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer, self._sha256 = tokenizer, sha256
        self._controls = {token.content: id_ for id_, token in added.items()}
        self._size = max([*tokenizer.get_vocab(with_added_tokens=True).values()], default=-1) + 1

    @classmethod
    def load(cls, path: str | Path) -> JsonTokenizer:
        """From a file; raises `ModelFileError` if it is none, `ModelMismatchError` if text could become a control token."""
        import tokenizers

        path = Path(path)
        try:
            data = path.read_bytes()
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ModelFileError(f"{path} is not a readable tokenizer.json: {error}") from error
        loaded = cls(tokenizer, hashlib.sha256(data).hexdigest())
        loaded._prove(path)
        return loaded

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._size

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return self._sha256

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; never a control token, and none is added in front or behind."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


class GgufTokenizer(_Segments):
    """llama.cpp's own vocabulary out of a GGUF; no weights are read."""

    def __init__(self, model: object, path: Path) -> None:
        """Takes a `llama_model` pointer over and frees it with itself; use `load`."""
        import llama_cpp

        self._llama, self._model = llama_cpp, model
        self._vocab = vocab = llama_cpp.llama_model_get_vocab(model)
        self._size: int = llama_cpp.llama_vocab_n_tokens(vocab)
        names = [llama_cpp.llama_vocab_get_text(vocab, id_) or b"" for id_ in range(self._size)]
        kinds = [int(llama_cpp.llama_vocab_get_attr(vocab, id_)) for id_ in range(self._size)]
        added = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        self._controls = {names[id_].decode("utf-8", "replace"): id_ for id_ in range(self._size) if kinds[id_] & added}
        digest = hashlib.sha256()
        for key in (b"tokenizer.ggml.model", b"tokenizer.ggml.pre"):
            buffer = ctypes.create_string_buffer(256)
            llama_cpp.llama_model_meta_val_str(model, key, buffer, len(buffer))
            digest.update(buffer.value + b"\0")
        for name, kind in zip(names, kinds, strict=True):
            digest.update(b"%d %d " % (kind, len(name)) + name)
        self._sha256 = digest.hexdigest()
        self._prove(path)

    @classmethod
    def load(cls, path: str | Path) -> GgufTokenizer:
        """From a GGUF file; its log is silenced.

        Raises `RuntimeMissingError` without llama-cpp-python, `ModelFileError` if llama.cpp reads no vocabulary from the
        file, `ModelMismatchError` if text could become a control token.
        """
        path = Path(path)
        try:
            import llama_cpp
        except ModuleNotFoundError as error:
            raise RuntimeMissingError("llama-cpp-python", "llama", "" if error.name == "llama_cpp" else str(error)) from error
        except (ImportError, OSError, RuntimeError) as error:  # its native library
            raise RuntimeMissingError("llama-cpp-python", "llama", str(error)) from error
        if not path.is_file():
            raise ModelFileError(f"There is no file {path}.")
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        with _quiet():
            llama_cpp.llama_backend_init()
            model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise ModelFileError(f"{path} holds no vocabulary that llama.cpp reads.")
        return cls(model, path)

    def __del__(self) -> None:
        model, self._model = getattr(self, "_model", None), None
        if model is not None:
            self._llama.llama_model_free(model)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._size

    @property
    def sha256(self) -> str:
        """Hash of all tokens, their types and the name of the pre-tokenizer."""
        return self._sha256

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; never a control token, and none is added in front or behind."""
        data = text.encode()
        room = len(data) + 8  # never more tokens than bytes; a few for a prepended space
        ids = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(self._vocab, data, len(data), ids, room, False, False)
        if count < 0:
            raise ModelFileError(f"llama.cpp failed to tokenize a text of {len(data)} bytes (status {count}).")
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self._piece, ids)).decode("utf-8", "replace")

    def _piece(self, id_: int) -> bytes:
        """Bytes of one token; `llama_detokenize` would drop spaces before punctuation."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count: int = self._llama.llama_token_to_piece(self._vocab, id_, buffer, size, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            size = -count


_QUIET = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """llama-cpp-python prints what its logger lets pass; its level is put back afterwards, an own log callback stays."""
    logger = logging.getLogger("llama-cpp-python")
    with _QUIET:
        level = logger.level
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)


def shared_prefix(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[int]:
    """Longest run of ids that all of the prompts begin with, found by encoding each as a whole.

    The prompts should differ right after what is meant to be shared; a merge over that border cannot spoil the result.
    """
    encoded = [tokenizer.encode(prompt.segments) for prompt in prompts]
    first, last = min(encoded), max(encoded)  # what the extremes share, all share
    for place, (left, right) in enumerate(zip(first, last, strict=False)):
        if left != right:
            return first[:place]
    return list(first)
