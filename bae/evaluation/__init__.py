"""Measure how good and how well calibrated completions are.

This room imports the rooms up to `bae.rollout`. Start with metrics.py (pure torch); measure.py makes a table of
completions into metrics, standard errors and figures.
"""
