"""Blockwise advantages inside other trainers: the method without this project's training loop.

This room imports `bae.text`, `bae.method`, `bae.batch` and `bae.objectives`. blockwise.py goes from sampled tokens to
an advantage for each token; the other modules put it where a trainer has its advantages. docs/integrations.md has
examples.
"""
