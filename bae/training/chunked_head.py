"""Log-probabilities and entropies from hidden states, without logits of all tokens at once. Pure torch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LOGITS = 2**26
"""Logits that are there at a time: enough tokens for matrix products at full speed."""
SLICE = 2**20
"""Logits that are worked on at a time on a CPU: few enough to stay in its cache."""


def head_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each id and entropy of its distribution, in nats, at the sampling temperature; (M,) each, in
    fp32 or more. Differentiable in hidden, weight and bias; the backward pass makes the logits again.

    hidden: (M, W). weight: (V, W) and bias: (V,), of the language model's head. ids: (M,).
    """
    log_p, entropy = _Chunked.apply(hidden, weight, bias, ids, temperature)
    return log_p, entropy


class _Chunked(torch.autograd.Function):
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
                # -inf * 0 where a logit is -inf
                entropy[at] = shifted - torch.linalg.vecdot(p, z.clamp_(min=torch.finfo(exact).min)) / total
        ctx.save_for_backward(hidden, weight, bias, ids, entropy, log_sum)
        ctx.temperature = temperature
        return log_p, entropy

    @staticmethod
    def backward(ctx: Any, d_log_p: Tensor, d_entropy: Tensor) -> Any:
        """d log p(id) / dz = (1[id] - p) and d H / dz = -p (log p + H), z the logits over the temperature."""
        hidden, weight, bias, ids, entropy, log_sum = ctx.saved_tensors
        exact = entropy.dtype
        d_hidden = torch.empty_like(hidden)
        # fp32, so that many small parts add up.
        d_weight = torch.zeros_like(weight, dtype=exact) if weight.requires_grad else None
        d_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and bias.requires_grad else None
        entropy_counts = bool(d_entropy.any())
        d_log_p, d_entropy = d_log_p / ctx.temperature, d_entropy / ctx.temperature
        for part in _parts(len(hidden), max(1, LOGITS // len(weight))):
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            for rows in _slices(logits):
                at = slice(part.start + rows.start, part.start + rows.stop)
                column = lambda x: x[at].unsqueeze(1)  # noqa: B023, E731
                log_q = torch.sub(logits[rows].to(exact) / ctx.temperature, column(log_sum))
                q = log_q.exp()
                if entropy_counts:
                    log_q.clamp_(min=torch.finfo(exact).min).add_(column(entropy)).mul_(column(d_entropy))
                    q.mul_(log_q.add_(column(d_log_p)).neg_())
                else:
                    q.mul_(-column(d_log_p))
                logits[rows] = q.scatter_add_(1, column(ids), column(d_log_p))
            torch.mm(logits, weight, out=d_hidden[part])
            if d_weight is not None:
                if exact == weight.dtype:
                    d_weight.addmm_(logits.T, hidden[part])
                else:
                    d_weight += logits.T @ hidden[part]
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=exact)
        return (d_hidden, None if d_weight is None else d_weight.to(weight.dtype),
                None if d_bias is None else d_bias.to(bias.dtype), None, None)  # fmt: skip


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _slices(logits: Tensor) -> Iterator[slice]:
    size = len(logits) if logits.device.type != "cpu" else max(1, SLICE // logits.shape[1])
    return _parts(len(logits), size)
