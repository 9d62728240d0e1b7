"""The logarithmic reward of a stated confidence (paper, task 1)."""

import torch
from torch import Tensor


def bce(q: Tensor, c: Tensor, epsilon: float) -> Tensor:
    """Return c log q + (1 - c) log(1 - q), elementwise, with q clipped to [epsilon, 1 - epsilon].

    It lies in [log epsilon, 0].
    """
    q = q.clamp(epsilon, 1 - epsilon)
    return torch.log(c * q + (1 - c) * (1 - q))
