"""Read what was written, and judge whether it is right: blocks and tokens of a completion, answers and verifiers.

This room imports no other room. Start with blocks.py (what a block is) and tokens.py (which token lies in which block);
verifier.py compares answers with references.
"""
