"""Blockwise-advantage RL: train a language model on completions that have several parts, with an objective for each.

Each room below imports only from the rooms before it: text, method, batch, objectives, tasks, training, rollout,
evaluation, fidelity, callbacks, report, commands. Start with batch.py for what flows through a training step, then read
callbacks/writers.py and training/update.py, which are the algorithm.
"""
