"""RLCR's single reward for the whole completion, the paper's scalar comparator."""

from bae.batch import Completion
from bae.objectives.brier import brier
from bae.objectives.correctness import correctness


def rlcr(completion: Completion) -> float | None:
    """c - (q - c)^2, in [-1, 1]; None without an answer or a readable confidence."""
    c, calibration = correctness(completion), brier(completion)
    return None if c is None or calibration is None else c + calibration
