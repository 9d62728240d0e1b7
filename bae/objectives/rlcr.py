"""RLCR's single reward for the whole completion, the paper's scalar comparator."""

from bae.batch import Completion
from bae.objectives.correctness import correctness


def rlcr(completion: Completion) -> float | None:
    """c - (q - c)^2, in [-1, 1]; None without an answer or a readable confidence."""
    c, q = correctness(completion), completion.confidence
    return None if c is None or q is None else c - (q - c) ** 2
