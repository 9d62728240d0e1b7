"""The logarithmic reward of a stated confidence (paper, task 1)."""

import math

from bae.batch import Completion


def bce(completion: Completion, epsilon: float) -> float | None:
    """c log q + (1 - c) log(1 - q), q clipped to [epsilon, 1 - epsilon]; in [log epsilon, 0]. None without a readable
    confidence."""
    if completion.confidence is None:
        return None
    q = min(max(completion.confidence, epsilon), 1 - epsilon)
    return math.log(q if completion.correct else 1 - q)
