"""Compute attention of completions that share prompts, with FlashAttention's kernels (arXiv 2205.14135) on a GPU.

A row of tokens holds sequences one after the other, without padding: first the prompts, then the completions, those of
one prompt side by side. One kernel call lets each sequence see its own past, and a second call lets all completions of
a prompt see the prompt. The log-sum-exp (lse) of each call tells how much its output counts in the whole. The backward
pass of a kernel needs only the output and the lse of the forward pass, so with those of the whole, the gradients of
both calls are exact.

Why no library does it: torch's varlen_attn calls the same kernels, but drops the gradient of its lse, which
the joined output needs. torch's other kernels need the keys of the prompt copied for each completion.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WIDEST = 256
"""The largest width of a head; widths must be multiples of 8."""


def is_usable(query: Tensor) -> bool:
    """Tell whether there are kernels for a query (…, D): it must be on a GPU and in half precision."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= WIDEST
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


class Lengths:
    """Hold where sequences begin that lie one after the other.

    begins: (N + 1,) int32, the first token of each sequence, and the end. longest: the number of tokens of the longest
    sequence. total: the number of all tokens.
    """

    def __init__(self, lengths: Sequence[int], device: Any) -> None:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        self.begins = ends.to(torch.int32).to(device)  # the type that the kernels need
        self.longest, self.total = max(lengths, default=0), int(ends[-1])


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Lengths,
    prompts: Lengths,
    completions: Lengths,
    scaling: float,
    more_key: Tensor | None = None,
    more_value: Tensor | None = None,
) -> Tensor:
    """Compute the attention of a row of sequences.

    Args:
        query: (H, S, D).
        key, value: (h, S, D).
        sequences: all sequences of the row, prompts first.
        prompts: the prompts of the row, and after them the prompts of more_key and more_value.
        completions: for each prompt, the tokens of all its completions together.
        scaling: multiplies the products of queries and keys.
        more_key, more_value: (h, S', D), of prompts that are not in the row.

    Returns:
        (S, H, D).
    """
    by_token = (None if x is None else x.transpose(0, 1) for x in (query, key, value, more_key, more_value))
    out: Tensor = _Row.apply(*by_token, sequences, prompts, completions, scaling)
    return out


class _Row(torch.autograd.Function):
    """Join the two calls of the kernels. All tensors are ordered by token: (S, H, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        more_key: Tensor | None,
        more_value: Tensor | None,
        sequences: Lengths,
        prompts: Lengths,
        completions: Lengths,
        scaling: float,
    ) -> Tensor:
        out, lse, states = _forward(query, key, value, sequences, sequences, True, scaling)
        if completions.total:
            own = slice(sequences.total - completions.total, None)
            before = _before(key, more_key, own.start), _before(value, more_value, own.start)
            there, lse_there, more = _forward(query[own], *before, completions, prompts, False, scaling)
            whole = torch.logaddexp(lse[:, own], lse_there)
            share = (lse_there - whole).exp().T.unsqueeze(-1)
            out[own] = out[own].float().lerp(there.float(), share).to(out.dtype)
            lse[:, own] = whole
            states = states + more
        ctx.save_for_backward(query, key, value, more_key, more_value, out, lse, *states)
        ctx.layout = sequences, prompts, completions, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, more_key, more_value, out, lse, *states = ctx.saved_tensors
        sequences, prompts, completions, scaling = ctx.layout
        grad = grad.contiguous()
        change = _backward(grad, query, key, value, out, lse, sequences, sequences, True, states[:2], scaling)
        to_more: list[Tensor | None] = [None, None]
        if completions.total:
            own = slice(sequences.total - completions.total, None)
            before = _before(key, more_key, own.start), _before(value, more_value, own.start)
            outputs = out[own], lse[:, own].contiguous()
            to_query, *to_before = _backward(
                grad[own], query[own], *before, *outputs, completions, prompts, False, states[2:], scaling
            )
            change[0][own] += to_query
            for total, add in zip(change[1:], to_before, strict=True):
                total[: own.start] += add[: own.start]
            if more_key is not None:
                to_more = [add[own.start :] for add in to_before]
        return *change, *to_more, None, None, None, None


def _before(x: Tensor, more: Tensor | None, tokens: int) -> Tensor:
    """Return the keys or values of all prompts: those of the row, then `more`."""
    return x[:tokens] if more is None else torch.cat([x[:tokens], more])


def _forward(
    query: Tensor, key: Tensor, value: Tensor, queries: Lengths, keys: Lengths, causal: bool, scaling: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Call the forward kernel.

    Returns:
        The output, (S, H, D); the lse, (H, S) in fp32; and the random state of the dropout, which is not used.
    """
    cuts = queries.begins, keys.begins, queries.longest, keys.longest
    out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, *cuts, 0.0, causal, False, scale=scaling
    )
    return out, lse, (seed, offset)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Lengths,
    keys: Lengths,
    causal: bool,
    state: Sequence[Tensor],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the backward kernel, and return the gradients of query, key and value."""
    cuts = queries.begins, keys.begins, queries.longest, keys.longest
    to_query, to_key, to_value = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, *cuts, 0.0, causal, *state, scale=scaling
    )
    return to_query, to_key, to_value
