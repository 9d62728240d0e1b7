"""Compute the blockwise clipped surrogate, and the log-probabilities and entropies that it needs. Pure torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from bae.method.advantages import spread_over_tokens

Aggregation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Weight the tokens of a batch: (block_of, block_weights, tokens) -> (N, T), zero outside every block.

    block_of       (N, T) long, -1 outside the completion
    block_weights  (K,), w_k
    tokens         (K,), the tokens of each block in the whole batch, divided by the number of ranks

N and `tokens` are of the whole batch, and gradients are averaged over ranks. So the gradient does not depend on how the
batch is cut into micro-batches or shared among ranks.
"""


def block_mean(block_of: Tensor, block_weights: Tensor, tokens: Tensor) -> Tensor:
    """Weight tokens by w_k / (N |T_k(i)|): mean over the tokens of a block, sum over blocks, mean over completions.

    Source: paper, section 3. With one block it is the weighting of GRPO (arXiv 2402.03300). Arguments: see Aggregation.
    """
    lengths = torch.stack([(block_of == k).sum(1) for k in range(len(block_weights))], 1)  # (N, K)
    return spread_over_tokens(block_weights / lengths.clamp(min=1) / len(block_of), block_of)


def token_mean(block_of: Tensor, block_weights: Tensor, tokens: Tensor) -> Tensor:
    """Weight tokens by w_k / tokens_k: mean over all tokens of a block in the batch, so long blocks count more.

    This is the token-level mean of DAPO (arXiv 2503.14476), block by block. If a rollout batch takes several optimiser
    steps, the mean is over the whole rollout batch. Arguments: see Aggregation.
    """
    each = block_weights / torch.where(tokens > 0, tokens, 1)  # a block without tokens needs no weight
    return spread_over_tokens(each.expand(len(block_of), -1), block_of)


def constant_length(block_of: Tensor, block_weights: Tensor, tokens: Tensor, length: int) -> Tensor:
    """Weight tokens by w_k / (N length): the sum over the tokens of a block is divided by a constant.

    So no length is favoured. This is the weighting of Dr. GRPO (arXiv 2503.20783).

    Args:
        block_of, block_weights, tokens: see Aggregation.
        length: the constant, such as the most tokens that a completion may have.
    """
    return spread_over_tokens((block_weights / length / len(block_of)).expand(len(block_of), -1), block_of)


def blockwise_clipped_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, clip: float, clip_high: float
) -> Tensor:
    """Compute L = -sum_t w_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps_high) A_t), rho_t = pi / pi_old.

    Source: paper, section 3. The paper has one eps; a clip_high above clip is the clip-higher of DAPO (arXiv
    2503.14476).

    Args:
        log_probs, old_log_probs: (B, T), of the sampled tokens, in nats.
        advantages: (B, T).
        weights: (B, T), from an Aggregation, zero outside the completion.
        clip, clip_high: eps and eps_high.

    Returns:
        A scalar.

    Raises:
        ValueError: if the shapes differ.
    """
    if not log_probs.shape == old_log_probs.shape == advantages.shape == weights.shape:
        raise ValueError("log_probs, old_log_probs, advantages and weights must have one shape")
    ratio = torch.exp(log_probs - old_log_probs)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip_high) * advantages)
    return -(weights * surrogate).sum()


def is_clipped(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float, clip_high: float) -> Tensor:
    """Tell where the clip makes the gradient zero; (B, T) bool. Arguments: see blockwise_clipped_loss."""
    ratio = torch.exp(log_probs - old_log_probs)
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))


def importance(log_probs: Tensor, sampled_log_probs: Tensor, cap: float) -> Tensor:
    """Return min(pi / mu, cap) for tokens that were drawn from mu instead of pi; any shape.

    The numerics of an engine are not those of the trainer, so its distribution mu differs a little from pi. This is
    truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training").

    Args:
        log_probs: in pi, in nats.
        sampled_log_probs: in mu, in nats.
        cap: the largest weight.
    """
    return torch.exp(log_probs - sampled_log_probs).clamp(max=cap)


def k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Estimate KL(pi, ref) token by token as log r, with r = pi / ref; any shape.

    The mean over tokens drawn from pi is right. As a term of the loss it is of no use: its gradient is that of log pi,
    whose mean is 0. Source of k1, k2 and k3: Schulman 2020, "Approximating KL divergence".

    Args:
        log_probs: in pi, in nats, of tokens drawn from pi. The result is differentiable in it.
        reference_log_probs: in ref, in nats.
    """
    return log_probs - reference_log_probs


def k2(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Estimate KL(pi, ref) token by token as (log r)² / 2, with r = pi / ref. Arguments: see k1.

    It is never below 0, and its mean is off where r is far from 1. Its gradient, (log r) grad log pi, has the gradient
    of KL(pi, ref) as its mean: of the three it is the one whose gradient is that of what is estimated.
    """
    return (log_probs - reference_log_probs).square() / 2


def k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Estimate KL(pi, ref) token by token as 1 / r - 1 + log r, with r = pi / ref. Arguments: see k1.

    Its mean is right, and it is never below 0. Its gradient, (1 - 1 / r) grad log pi, has the gradient of the other
    divergence, KL(ref, pi), as its mean. GRPO uses it (arXiv 2402.03300).
    """
    log_ratio = reference_log_probs - log_probs
    return log_ratio.expm1() - log_ratio


def mismatch(
    log_probs: Tensor, sampled_log_probs: Tensor, mask: Tensor, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Measure how far mu is from pi on tokens that were drawn from mu. Let r = pi / mu.

    Args:
        log_probs, sampled_log_probs: in pi and in mu, in nats; one shape.
        mask: bool, the tokens that count.
        cap: of `importance`; None for no cap.

    Returns:
        Three scalars: the sum of r - 1 - log r, whose mean estimates KL(mu, pi) in nats (k3); the number of
        tokens with r above the cap; and the largest |log r|.
    """
    log_ratio = (log_probs - sampled_log_probs).where(mask, 0.0)
    capped = torch.zeros_like(mask) if cap is None else log_ratio.exp() > cap
    return k3(sampled_log_probs, log_probs).where(mask, 0.0).sum(), capped.sum(), log_ratio.abs().max()


def log_probs_and_entropy(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each id and the entropy of its distribution, at the sampling temperature.

    bae.training.chunked_head computes the same without the logits of all tokens at once.

    Args:
        logits: (B, T, V).
        ids: (B, T) long.
        temperature: divides the logits.

    Returns:
        The log-probabilities and the entropies, (B, T) each, in fp32 and in nats.
    """
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy
