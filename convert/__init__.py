"""Checkpoints to quantised GGUF and ONNX artifacts, each held against its source."""
