"""The Brier reward of a stated confidence (paper, task 1)."""

from torch import Tensor


def brier(q: Tensor, c: Tensor) -> Tensor:
    """-(q - c)^2, in [-1, 0]; elementwise."""
    return -((q - c) ** 2)
