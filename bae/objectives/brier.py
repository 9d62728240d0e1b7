"""The Brier reward of a stated confidence (paper, task 1)."""

from torch import Tensor


def brier(q: Tensor, c: Tensor) -> Tensor:
    """Return -(q - c)^2, elementwise; it lies in [-1, 0]."""
    return -((q - c) ** 2)
