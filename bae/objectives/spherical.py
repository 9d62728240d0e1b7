"""The spherical reward of a stated confidence: another proper scoring rule, and a bounded one."""

import torch
from torch import Tensor


def spherical(q: Tensor, c: Tensor) -> Tensor:
    """Return (c q + (1 - c)(1 - q)) / sqrt(q^2 + (1 - q)^2), elementwise (Gneiting and Raftery, 2007).

    It lies in [0, 1].
    """
    return (c * q + (1 - c) * (1 - q)) / torch.sqrt(q**2 + (1 - q) ** 2)
