"""Measure how near each baseline's advantages and gradients come to Monte Carlo's (paper, Fig. 1).

This room imports the rooms up to `bae.evaluation`. Start with measure.py, which samples later blocks again from each
completion's own prefix. compare.py compares every baseline with what these samples say; compare_to_monte_carlo.py and
gradient_agreement.py have the statistics.
"""
