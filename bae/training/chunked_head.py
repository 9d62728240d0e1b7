"""Compute log-probabilities and entropies from hidden states, without the logits of all tokens at once. Pure torch.

Here the logits are made part by part, and again in the backward pass, so their memory does not grow with the number of
tokens.

Why no library does it: torch's `log_softmax` and `cross_entropy` need all (M, V) logits in memory, and keep them for
the backward pass. `linear_cross_entropy` of torch 2.13 can work in chunks too, but it returns no entropy, and in
chunks it computes gradients in the forward pass, when the clipped loss does not yet know the weights of the tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LOGITS = 2**26
"""The most logits in memory at a time: enough tokens for matrix products at full speed."""
SLICE = 2**20
"""The most logits that a CPU works on at a time: few enough to stay in its cache."""


def head_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each id and the entropy of its distribution, at the sampling temperature.

    The result is differentiable in hidden, weight and bias. The backward pass makes the logits again.

    Args:
        hidden: (M, W), the states of M tokens.
        weight: (V, W), of the head of the language model.
        bias: (V,) or None, of the head.
        ids: (M,) long.
        temperature: divides the logits.

    Returns:
        The log-probabilities and the entropies, (M,) each, in nats and in fp32 or more.
    """
    log_p, entropy = _Chunked.apply(hidden, weight, bias, ids, temperature)
    return log_p, entropy


class _Chunked(torch.autograd.Function):
    """Make the logits part by part, in the forward pass and again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float)
        log_p, entropy, log_sum = (hidden.new_empty(len(hidden), dtype=exact) for _ in range(3))
        for part in _parts(len(hidden), max(1, LOGITS // len(weight))):
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            for rows in _slices(logits):
                at = slice(part.start + rows.start, part.start + rows.stop)
                z = logits[rows].to(exact)
                if temperature != 1:
                    z.div_(temperature)
                chosen, top = z.gather(1, ids[at].unsqueeze(1)).squeeze(1), z.amax(1)
                p = z.sub_(top.unsqueeze(1)).exp()
                total = p.sum(1)
                shifted = torch.log(total)
                log_sum[at] = shifted + top
                log_p[at] = chosen - log_sum[at]
                # The clamp avoids -inf * 0 where a logit is -inf.
                entropy[at] = shifted - torch.linalg.vecdot(p, z.clamp_(min=torch.finfo(exact).min)) / total
        ctx.save_for_backward(hidden, weight, bias, ids, entropy, log_sum)
        ctx.temperature = temperature
        return log_p, entropy

    @staticmethod
    def backward(ctx: Any, d_log_p: Tensor, d_entropy: Tensor) -> Any:
        """Use d log p(id) / dz = 1[id] - p and dH / dz = -p (log p + H), with z the logits over the temperature."""
        hidden, weight, bias, ids, entropy, log_sum = ctx.saved_tensors
        exact = entropy.dtype
        d_hidden = torch.empty_like(hidden)
        # Sums of many small parts need fp32.
        d_weight = torch.zeros_like(weight, dtype=exact) if weight.requires_grad else None
        d_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and bias.requires_grad else None
        entropy_counts = bool(d_entropy.any())
        d_log_p, d_entropy = d_log_p / ctx.temperature, d_entropy / ctx.temperature
        for part in _parts(len(hidden), max(1, LOGITS // len(weight))):
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            for rows in _slices(logits):
                at = slice(part.start + rows.start, part.start + rows.stop)
                to_log_p = d_log_p[at].unsqueeze(1)
                log_q = torch.sub(logits[rows].to(exact) / ctx.temperature, log_sum[at].unsqueeze(1))
                q = log_q.exp()
                if entropy_counts:
                    log_q.clamp_(min=torch.finfo(exact).min).add_(entropy[at].unsqueeze(1))
                    q.mul_(log_q.mul_(d_entropy[at].unsqueeze(1)).add_(to_log_p).neg_())
                else:
                    q.mul_(-to_log_p)
                logits[rows] = q.scatter_add_(1, ids[at].unsqueeze(1), to_log_p)
            torch.mm(logits, weight, out=d_hidden[part])
            if d_weight is not None:
                if exact == weight.dtype:
                    d_weight.addmm_(logits.T, hidden[part])
                else:
                    d_weight += logits.T @ hidden[part]
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=exact)
        to_weight = None if d_weight is None else d_weight.to(weight.dtype)
        to_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, to_weight, to_bias, None, None


def _parts(count: int, size: int) -> Iterator[slice]:
    """Cut `count` rows into parts of `size` rows or less."""
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _slices(logits: Tensor) -> Iterator[slice]:
    """Cut logits into rows that stay in the cache of a CPU; elsewhere they stay in one piece."""
    size = len(logits) if logits.device.type != "cpu" else max(1, SLICE // logits.shape[1])
    return _parts(len(logits), size)
