"""Compute blockwise advantages (paper, section 3): each block gets its own advantage, on its own tokens. Pure torch."""

from torch import Tensor


def advantages(rewards: Tensor, baselines: Tensor, present: Tensor) -> Tensor:
    """Compute A_j(i) = r_j(i) - b_j(i). It is centred, but never divided by a standard deviation.

    Args:
        rewards, baselines: (N, J).
        present: (N, J) bool, whether objective j counts for completion i.

    Returns:
        (N, J), zero where an objective does not count.

    Raises:
        ValueError: if the shapes differ.
    """
    if not rewards.shape == baselines.shape == present.shape:
        raise ValueError(f"shapes differ: {rewards.shape}, {baselines.shape}, {present.shape}")
    return (rewards - baselines) * present


def sum_by_block(per_objective: Tensor, block_of_objective: list[int], weights: list[float], blocks: int) -> Tensor:
    """Sum the weighted advantages of the objectives of each block.

    Args:
        per_objective: (N, J), the advantages.
        block_of_objective: J block numbers.
        weights: J weights of the objectives.
        blocks: K.

    Returns:
        (N, K).
    """
    per_block = per_objective.new_zeros(len(per_objective), blocks)
    for j, (block, weight) in enumerate(zip(block_of_objective, weights, strict=True)):
        per_block[:, block] += weight * per_objective[:, j]
    return per_block


def spread_over_tokens(per_block: Tensor, block_of: Tensor) -> Tensor:
    """Give each token the value of its block; (N, K), (N, T) -> (N, T), zero where block_of is -1."""
    return per_block.gather(1, block_of.clamp(min=0)) * (block_of >= 0)
