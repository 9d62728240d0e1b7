"""Attention of completions that share prompts, by FlashAttention's kernels (arXiv 2205.14135) on a GPU.

A row of tokens holds sequences one after the other, without padding: first prompts, then completions, those of a prompt
side by side. Each sequence sees its own past by one call, and all completions of a prompt see the prompt by another.
Their logarithms of sums of exponentials (lse) tell how much each counts in the whole; and as a kernel's backward pass
asks for nothing of the forward pass but the output and the lse, those of the whole make both calls' gradients exact.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WIDEST = 256
"""Numbers in a head, at most; a multiple of 8."""


def is_usable(query: Tensor) -> bool:
    """Whether there are kernels for it: (…, D) on a GPU, in half precision."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= WIDEST
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


class Lengths:
    """Where sequences that lie one after the other begin. longest: tokens of the longest. total: of all."""

    def __init__(self, lengths: Sequence[int], device: Any):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        self.begins = ends.to(torch.int32).to(device)  # (N + 1,), as the kernels want it
        self.longest, self.total = max(lengths, default=0), int(ends[-1])


def row_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: Lengths, prompts: Lengths, completions: Lengths,
    scaling: float, more_key: Tensor | None = None, more_value: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """query: (H, S, D). key, value: (h, S, D). sequences: all, prompts first. prompts: these, and after them those
    whose keys and values are more_key and more_value, (h, S', D). completions: for each prompt the tokens of its
    completions, together. Returns (S, H, D)."""
    by_token = (None if x is None else x.transpose(0, 1) for x in (query, key, value, more_key, more_value))
    out: Tensor = _Row.apply(*by_token, sequences, prompts, completions, scaling)
    return out


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, more_key: Tensor | None, more_value: Tensor | None,
                sequences: Lengths, prompts: Lengths, completions: Lengths, scaling: float) -> Tensor:  # fmt: skip
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
            to_query, *to_before = _backward(
                grad[own], query[own], *before, out[own], lse[:, own].contiguous(),
                completions, prompts, False, states[2:], scaling,
            )  # fmt: skip
            change[0][own] += to_query
            for total, add in zip(change[1:], to_before, strict=True):
                total[: own.start] += add[: own.start]
            if more_key is not None:
                to_more = [add[own.start :] for add in to_before]
        return *change, *to_more, None, None, None, None


def _before(x: Tensor, more: Tensor | None, tokens: int) -> Tensor:
    """Of the prompts."""
    return x[:tokens] if more is None else torch.cat([x[:tokens], more])


def _forward(
    query: Tensor, key: Tensor, value: Tensor, queries: Lengths, keys: Lengths, causal: bool, scaling: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(S, H, D), the lse (H, S) in fp32, and the state of a dropout that is none."""
    out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, queries.begins, keys.begins, queries.longest, keys.longest, 0.0, causal, False, scale=scaling
    )
    return out, lse, (seed, offset)


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    queries: Lengths, keys: Lengths, causal: bool, state: Sequence[Tensor], scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What query, key and value get."""
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, queries.begins, keys.begins, queries.longest, keys.longest, 0.0, causal,
        *state, scale=scaling,
    )  # fmt: skip
