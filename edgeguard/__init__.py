"""On-device inference for Llama Guard 2: a conversation in, `safe` or `unsafe` with categories out."""

__version__ = "0.1.0"
