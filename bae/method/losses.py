"""The blockwise clipped surrogate, and the log-probabilities and entropies it needs. Pure torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from bae.method.advantages import spread_over_tokens

Aggregation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""How the tokens of a batch are weighed: (block_of, block_weights, tokens) -> (N, T), zero outside every block.

block_of: (N, T) long, -1 outside the completion. block_weights: (K,). tokens: (K,), those of each block that a rank has
on average in the whole batch. N and `tokens` are of the whole batch, and gradients are averaged over ranks: so the
gradient does not depend on how the batch is cut into micro-batches or shared among ranks.
"""


def block_mean(block_of: Tensor, block_weights: Tensor, tokens: Tensor) -> Tensor:
    """w_k / (N |T_k(i)|): mean over a block's tokens, sum over blocks, mean over completions (paper, section 3).

    With one block: GRPO's (arXiv 2402.03300).
    """
    lengths = torch.stack([(block_of == k).sum(1) for k in range(len(block_weights))], 1)  # (N, K)
    return spread_over_tokens(block_weights / lengths.clamp(min=1) / len(block_of), block_of)


def token_mean(block_of: Tensor, block_weights: Tensor, tokens: Tensor) -> Tensor:
    """w_k / tokens_k: mean over all tokens that a block has in the batch, so that long blocks count for more.

    DAPO's token-level mean (arXiv 2503.14476), block by block. Of the whole rollout batch, where it takes several
    optimiser steps.
    """
    each = block_weights / torch.where(tokens > 0, tokens, 1)  # without tokens there is none to weigh
    return spread_over_tokens(each.expand(len(block_of), -1), block_of)


def constant_length(block_of: Tensor, block_weights: Tensor, tokens: Tensor, length: int) -> Tensor:
    """w_k / (N length): sum over a block's tokens, over a constant, so that no length is favoured.

    Dr. GRPO's (arXiv 2503.20783). length: such as the most tokens that a completion may have.
    """
    return spread_over_tokens((block_weights / length / len(block_of)).expand(len(block_of), -1), block_of)


def blockwise_clipped_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, clip: float, clip_high: float
) -> Tensor:
    """L = -sum_t w_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps_high) A_t), rho_t = pi / pi_old (paper, section 3).

    All tensors are (B, T); `weights` are an Aggregation's, zero outside the completion. Returns a scalar. The paper has
    one eps; a clip_high above clip is DAPO's clip-higher (arXiv 2503.14476). Raises ValueError if the shapes differ.
    """
    if not log_probs.shape == old_log_probs.shape == advantages.shape == weights.shape:
        raise ValueError("log_probs, old_log_probs, advantages and weights must have one shape")
    ratio = torch.exp(log_probs - old_log_probs)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip_high) * advantages)
    return -(weights * surrogate).sum()


def is_clipped(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float, clip_high: float) -> Tensor:
    """(B, T) bool: where the clip took the gradient away."""
    ratio = torch.exp(log_probs - old_log_probs)
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))


def importance(log_probs: Tensor, sampled_log_probs: Tensor, cap: float) -> Tensor:
    """min(pi / mu, cap), for tokens that were drawn from mu in the place of pi; any shape.

    An engine's numerics are not the trainer's, so its distribution mu is a little another one (truncated importance
    sampling: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    return torch.exp(log_probs - sampled_log_probs).clamp(max=cap)


def mismatch(
    log_probs: Tensor, sampled_log_probs: Tensor, mask: Tensor, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """How far mu is from pi on the tokens drawn from it: the sum of r - 1 - log r, r = pi / mu, whose mean estimates
    KL(mu, pi) (Schulman's k3), in nats; how many have r above the cap; and the largest |log r|. Scalars."""
    log_ratio = (log_probs - sampled_log_probs).where(mask, 0.0)
    capped = torch.zeros_like(mask) if cap is None else log_ratio.exp() > cap
    return (log_ratio.expm1() - log_ratio).sum(), capped.sum(), log_ratio.abs().max()


def log_probs_and_entropy(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each id and entropy of its distribution, in nats, at the sampling temperature.

    logits: (B, T, V). ids: (B, T). Returns (B, T) and (B, T), in fp32. bae.training.chunked_head has the same without
    logits of
    all tokens at once.
    """
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy
