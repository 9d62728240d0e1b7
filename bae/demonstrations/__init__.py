"""Completions that a policy imitates before reinforcement learning begins: the warm start.

They teach a format, and a confidence that says nothing yet. This room imports the rooms up to `bae.rollout`. Start with
pieces.py, which says what a demonstration is. columns.py writes demonstrations from the columns of a data set,
arithmetic.py those of the policies that ship, and tiny.py makes these policies with random weights.
bae/callbacks/demonstrations.py puts demonstrations on the batch.
"""
