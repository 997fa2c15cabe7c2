"""Training rows of our own for the mini guard: matched pairs, replies, five more languages, and label-preserving changes."""
