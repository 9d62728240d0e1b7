"""Project long vectors, such as gradients, to a few numbers that keep their dot products. Pure torch."""

from functools import lru_cache

import torch
from torch import Tensor


def count_sketch(vector: Tensor, size: int, seed: int = 0) -> Tensor:
    """Project a vector so that dot products stay the same in expectation (Charikar et al., 2002).

    Each coordinate is added to a random bucket with a random sign. The relative error of |v|² is about √(2/size). The
    same D, size and seed give the same projection, which is kept for the next call.

    Args:
        vector: (D,).
        size: the number of buckets.
        seed: of the buckets and signs.

    Returns:
        (size,), in single precision or more.

    Raises:
        ValueError: if `vector` has not one dimension, or `size` is below 1.
    """
    if vector.ndim != 1 or size < 1:
        raise ValueError(f"expected a vector and a size of 1 or more, got shape {tuple(vector.shape)} and size {size}")
    bucket, sign = _hashes(len(vector), size, seed, vector.device)
    vector = vector.to(torch.promote_types(vector.dtype, torch.float))
    return vector.new_zeros(size).index_add_(0, bucket, vector * sign)


@lru_cache(maxsize=2)  # few, because they are as large as the model
def _hashes(dimensions: int, size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw the bucket and the sign of each coordinate, (D,) each."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2 * size, (dimensions,), generator=generator, dtype=torch.int)
    return (drawn // 2).to(device), (drawn % 2 * 2 - 1).to(device, torch.int8)
