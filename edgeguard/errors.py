"""Every error that edgeguard raises on purpose. Catch `EdgeGuardError`, or the built-in that a leaf also is.

    EdgeGuardError
    ├── InputError (ValueError)            what the caller gave cannot be judged
    │   ├── ConversationError              empty, wrong roles or order, not text
    │   ├── PolicyError                    a policy or category list that makes no sense
    │   └── ContextLengthError             longer than the model's context
    ├── ModelError
    │   ├── ModelNotFoundError (LookupError)
    │   ├── ModelFileError (ValueError)    not a model, damaged, or of an unknown kind
    │   ├── ModelMismatchError (ValueError) model, tokenizer and profile do not belong together
    │   └── ModelMemoryError (MemoryError) would not fit into this machine's memory
    ├── RuntimeMissingError (ImportError)  an optional package is not installed
    ├── DeviceError (RuntimeError)         the device asked for was not granted
    ├── InferenceError (RuntimeError)      the model ran and its result cannot be trusted
    ├── CancelledError (RuntimeError)      the caller cancelled
    ├── DeadlineError (TimeoutError)       the caller's time ran out
    ├── StoreError (OSError)               disk, lock, download
    └── ConversionError (RuntimeError)     a conversion could not be done or failed its gate

None of them ever stands for a verdict: whoever catches one knows that the text was not judged.
"""

from __future__ import annotations


class EdgeGuardError(Exception):
    """Root of all errors raised on purpose by edgeguard."""


class InputError(EdgeGuardError, ValueError):
    """What the caller gave cannot be judged."""


class ConversationError(InputError):
    """The conversation is empty, not text, or its roles are unknown or out of order."""


class PolicyError(InputError):
    """The policy is malformed, names unknown categories, or the model reads no policy."""


class ContextLengthError(InputError):
    """The prompt has more tokens than the model's context holds."""

    def __init__(self, tokens: int, limit: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(
            f"The prompt has {tokens} tokens, the model's context holds {limit}. Shorten the text or judge it in parts."
        )


class ModelError(EdgeGuardError):
    """Something is wrong with a model, before any text was read."""


class ModelNotFoundError(ModelError, LookupError):
    """No model of that name or at that path."""


class ModelFileError(ModelError, ValueError):
    """A file is not a model, is damaged, or is of a kind that edgeguard does not read."""


class ModelMismatchError(ModelError, ValueError):
    """Model, tokenizer and profile do not belong together."""


class ModelMemoryError(ModelError, MemoryError):
    """The model would not fit into this machine's memory."""


class RuntimeMissingError(EdgeGuardError, ImportError):
    """An optional package is missing or cannot be loaded: `what` needs the extra `extra`."""

    def __init__(self, what: str, extra: str, reason: str = "") -> None:
        self.what, self.extra = what, extra
        state = f"cannot be loaded ({reason}); is there enough memory? Else install it again" if reason else "is not installed. Install it"
        super().__init__(f'{what} {state} with: pip install "edgeguard[{extra}]"')


class DeviceError(EdgeGuardError, RuntimeError):
    """The device asked for by name is not there or was not granted."""


class InferenceError(EdgeGuardError, RuntimeError):
    """The model ran and its result cannot be trusted: NaN, infinity, or no probability on any answer."""


class CancelledError(EdgeGuardError, RuntimeError):
    """The caller cancelled the call."""


class DeadlineError(EdgeGuardError, TimeoutError):
    """The caller's time ran out before there was a verdict."""


class StoreError(EdgeGuardError, OSError):
    """A file, lock or download failed."""


class ConversionError(EdgeGuardError, RuntimeError):
    """A conversion cannot be done, or its result failed the gate against its source."""
