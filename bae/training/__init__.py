"""Turn a batch that has advantages into optimiser steps.

This room imports `bae.text`, `bae.method`, `bae.batch` and `bae.objectives`. Start with update.py, which is plain
PyTorch; module.py is the Lightning module around it, policy.py loads models, sharding.py cuts weights up over ranks,
and forward.py, packing.py and attention*.py make the forward pass fast.
"""
