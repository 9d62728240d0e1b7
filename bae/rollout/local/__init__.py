"""Sample in this process with the weights that are being trained, and encode each prompt once for its group.

This folder imports what `bae.rollout` may import. Start with engine.py; cache.py holds keys and values.
"""
