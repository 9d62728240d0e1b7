"""The Brier reward of a stated confidence (paper, task 1)."""

from bae.batch import Completion


def brier(completion: Completion) -> float | None:
    """-(q - c)^2, in [-1, 0]; None without a readable confidence."""
    if completion.confidence is None:
        return None
    return -((completion.confidence - completion.correct) ** 2)
