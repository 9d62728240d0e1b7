"""The blockwise clipped surrogate, and the log-probabilities and entropies it needs. Pure torch."""

import torch
from torch import Tensor


def token_weights(block_of: Tensor, block_weights: Tensor) -> Tensor:
    """w_k / (N |T_k(i)|) of each token: mean over a block's tokens, sum over blocks, mean over completions; (N, T).

    block_of: (N, T) long, -1 outside the completion. block_weights: (K,).
    N is the whole batch, so that the gradient does not depend on how it is cut into micro-batches.
    """
    one_hot = (block_of.unsqueeze(-1) == torch.arange(len(block_weights), device=block_of.device)).to(block_weights)
    lengths = one_hot.sum(dim=1)  # (N, K)
    per_block = block_weights / lengths.clamp(min=1) / len(block_of)
    return (one_hot * per_block.unsqueeze(1)).sum(-1)


def blockwise_clipped_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, clip: float
) -> Tensor:
    """L = -sum_t w_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t), rho_t = pi / pi_old (paper, section 3).

    All arguments are (B, T); `weights` are `token_weights`, zero outside the completion. Returns a scalar.
    """
    if not log_probs.shape == old_log_probs.shape == advantages.shape == weights.shape:
        raise ValueError("log_probs, old_log_probs, advantages and weights must have one shape")
    ratio = torch.exp(log_probs - old_log_probs)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(weights * surrogate).sum()


def is_clipped(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """(B, T) bool: where the clip took the gradient away."""
    ratio = torch.exp(log_probs - old_log_probs)
    return ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))


def log_probs_and_entropy(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each id and entropy of its distribution, in nats, at the sampling temperature.

    logits: (B, T, V). ids: (B, T). Returns (B, T) and (B, T), in fp32.
    """
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy
