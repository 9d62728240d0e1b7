"""Sample in this process with the weights that are being trained, each prompt encoded once for its group.

Imports what `bae.rollout` may import. Start with engine.py; cache.py holds keys and values.
"""
