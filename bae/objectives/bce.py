"""The logarithmic reward of a stated confidence (paper, task 1)."""

import torch
from torch import Tensor


def bce(q: Tensor, c: Tensor, epsilon: float) -> Tensor:
    """c log q + (1 - c) log(1 - q), q clipped to [epsilon, 1 - epsilon]; in [log epsilon, 0]; elementwise."""
    q = q.clamp(epsilon, 1 - epsilon)
    return torch.log(c * q + (1 - c) * (1 - q))
