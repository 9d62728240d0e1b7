"""The spherical reward of a stated confidence: a third proper scoring rule, and bounded."""

import torch
from torch import Tensor


def spherical(q: Tensor, c: Tensor) -> Tensor:
    """(c q + (1 - c)(1 - q)) / sqrt(q^2 + (1 - q)^2), in [0, 1]; elementwise (Gneiting and Raftery, 2007)."""
    return (c * q + (1 - c) * (1 - q)) / torch.sqrt(q**2 + (1 - q) ** 2)
