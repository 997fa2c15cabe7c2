"""Runtimes behind one contract."""
