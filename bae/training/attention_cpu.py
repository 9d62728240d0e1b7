"""Compute attention of completions that share prompts: each sees its prompt and its own past. Pure torch.

    P  prompts     n  completions of a prompt     T  tokens of a completion     L  tokens of a prompt
    h  key and value heads     r  query heads of each     D  width of a head

Everything is padded on the right. On a CPU, no prompt is copied. GPUs in half precision have kernels of their own: see
bae.training.attention_gpu.

Why no library does it: torch's scaled_dot_product_attention needs the keys of the prompt copied for each completion
(`_dense` does this for devices other than CPUs). flex_attention needs no copies, but it refuses a backward pass on
CPUs in torch 2.13.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

TILE = 2**22
"""The scores made at a time on a CPU: enough to keep its cores busy, and few enough to take little memory."""


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompts: Sequence[int],
    widths: Sequence[int],
) -> Tensor:
    """Compute the attention of completions over their prompts and their own past.

    Args:
        query: (P, h, n, r, T, D), already scaled.
        key, value: (P, h, n, T, D), of the completions.
        prompt_key, prompt_value: (P, h, L, D); L may be 0.
        prompts: the number of tokens of each prompt.
        widths: the number of tokens of the longest completion of each prompt.

    Returns:
        (P, h, n, r, T, D). The values at padding have no meaning.
    """
    attend = _Tiled.apply if query.device.type == "cpu" else _dense
    out: Tensor = attend(query, key, value, prompt_key, prompt_value, tuple(prompts), tuple(widths))
    return out


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompts: Sequence[int],
    widths: Sequence[int],
) -> Tensor:
    """Use torch's kernels, which need the keys of the prompt copied for each completion."""
    out = []
    for p, (length, width) in enumerate(zip(prompts, widths, strict=True)):
        q = query[p, :, :, :, :width].permute(1, 0, 2, 3, 4).flatten(1, 2)  # (n, h * r, T, D)
        k, v = (
            torch.cat([before[p, :, :length].expand(len(q), -1, -1, -1), own[p, :, :, :width].transpose(0, 1)], 2)
            for before, own in ((prompt_key, key), (prompt_value, value))
        )
        mask = causal_lower_right(width, length + width)
        dense = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True)
        dense = dense.unflatten(1, (query.shape[1], query.shape[3])).permute(1, 0, 2, 3, 4)
        out.append(torch.nn.functional.pad(dense, (0, 0, 0, query.shape[4] - width)))
    return torch.stack(out)


class _Tile(NamedTuple):
    """Select some queries, and the keys that they see.

    Args:
        prompts, heads, completions, tokens: the queries, as slices of each dimension. The queries see their past up to
            the end of `tokens`.
        lengths: the number of tokens of each of the prompts.
    """

    prompts: slice
    heads: slice
    completions: slice
    tokens: slice
    lengths: Sequence[int]

    def queries(self, x: Tensor) -> Tensor:
        """Select the queries of (P, h, n, r, T, D)."""
        return x[self.prompts, self.heads, self.completions, :, self.tokens]

    def past(self, x: Tensor) -> Tensor:
        """Select the past of the queries from (P, h, n, T, D)."""
        return x[self.prompts, self.heads, self.completions, : self.tokens.stop]

    def before(self, x: Tensor) -> Tensor:
        """Select the prompts of the queries from (P, h, L, D)."""
        return x[self.prompts, self.heads, : max(self.lengths)]


def _tiles(query: Tensor, prompts: Sequence[int], widths: Sequence[int]) -> Iterator[_Tile]:
    """Cut all queries into tiles that have about TILE scores each."""
    count, heads, completions, r = query.shape[:4]
    whole = max(1, TILE // (heads * completions * r * max(widths) * (max(prompts) + max(widths))))
    for p in range(0, count, whole):
        length, width = max(prompts[p : p + whole]), max(widths[p : p + whole])
        each = r * width * (length + width)  # scores of one head and completion
        some_heads = min(heads, max(1, TILE // (completions * each)))
        some_rows = min(completions, max(1, TILE // each))
        some_tokens = min(width, max(1, TILE // (r * (length + width))))
        for h in range(0, heads, some_heads):
            for n in range(0, completions, some_rows):
                for t in range(0, width, some_tokens):
                    yield _Tile(
                        slice(p, p + whole),
                        slice(h, h + some_heads),
                        slice(n, n + some_rows),
                        slice(t, min(t + some_tokens, width)),
                        prompts[p : p + whole],
                    )


class _Tiled(torch.autograd.Function):
    """Use matrix products over all completions of a prompt, tile by tile.

    The scores of a tile are made again in the backward pass, as in FlashAttention (arXiv 2205.14135), so no scores are
    kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        prompts: Sequence[int],
        widths: Sequence[int],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value)
        ctx.sizes = prompts, widths
        out = torch.zeros_like(query)
        for tile in _tiles(query, prompts, widths):
            q, k, pk = tile.queries(query), tile.past(key), tile.before(prompt_key)
            p = _halves(_probabilities(q, k, pk, tile), k, pk)
            mixed = _mixed(p, tile.past(value), tile.before(prompt_value))
            tile.queries(out).copy_(mixed.view(q.shape))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        tensors = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in tensors]
        for tile in _tiles(tensors[0], *ctx.sizes):
            q, g = tile.queries(tensors[0]), tile.queries(grad)
            k, v = (tile.past(x) for x in tensors[1:3])
            pk, pv = (tile.before(x) for x in tensors[3:])
            p = _probabilities(q, k, pk, tile)
            change = _halves(torch._softmax_backward_data(_products(g, v, pv), p, -1, p.dtype), k, pk)
            tile.queries(grads[0]).copy_(_mixed(change, k, pk).view(q.shape))
            for weights, x, own, before in (
                (change, q, grads[1], grads[3]),
                (_halves(p, k, pk), g, grads[2], grads[4]),
            ):
                to_own, to_before = _gathered(weights, x)
                tile.past(own).add_(to_own)
                tile.before(before).add_(to_before)
        return *grads, None, None


def _products(q: Tensor, k: Tensor, pk: Tensor) -> Tensor:
    """Multiply each query with the keys of its prompt, then with those of its past; (p, h, n, r, t, l + b), fp32."""
    (p, h, n, r, t, d), b, l = q.shape, k.shape[3], pk.shape[2]  # noqa: E741
    out = torch.empty(p, h, n, r, t, l + b, dtype=torch.promote_types(q.dtype, torch.float))
    out[..., l:] = (q.reshape(p * h * n, r * t, d) @ k.reshape(p * h * n, b, d).mT).view(p, h, n, r, t, b)
    if l:
        out[..., :l] = (q.reshape(p * h, n * r * t, d) @ pk.reshape(p * h, l, d).mT).view(p, h, n, r, t, l)
    return out


def _probabilities(q: Tensor, k: Tensor, pk: Tensor, tile: _Tile) -> Tensor:
    """Return the softmax of the scores, without future tokens and padding; (p, h, n, r, t, l + b)."""
    scores, length = _products(q, k, pk), pk.shape[2]
    future = torch.ones(q.shape[4], k.shape[3], dtype=torch.bool).triu(1 + tile.tokens.start)
    scores[..., length:].masked_fill_(future, -math.inf)
    if min(tile.lengths) < length:
        padding = torch.arange(length) >= torch.tensor(tile.lengths).unsqueeze(1)
        scores[..., :length].masked_fill_(padding.view(-1, 1, 1, 1, 1, length), -math.inf)
    return scores.softmax(-1)


def _halves(weights: Tensor, k: Tensor, pk: Tensor) -> tuple[Tensor, Tensor]:
    """Split (p, h, n, r, t, l + b) for matrix products with the past and with the prompt.

    Returns:
        (p * h * n, r * t, b) and (p * h, n * r * t, l), in the dtype of the keys.
    """
    (p, h, n, r, t, _), b, l = weights.shape, k.shape[3], pk.shape[2]  # noqa: E741
    own, before = weights[..., l:].to(k.dtype), weights[..., :l].to(k.dtype)
    return own.reshape(p * h * n, r * t, b), before.reshape(p * h, n * r * t, l)


def _mixed(weights: tuple[Tensor, Tensor], own: Tensor, before: Tensor) -> Tensor:
    """Sum own, (p, h, n, b, D), and before, (p, h, l, D), with the weights of _halves; (p, h, n, r * t, D)."""
    (p, h, n, _, d), t = own.shape, weights[0].shape[1]
    out = (weights[0] @ own.reshape(p * h * n, -1, d)).view(p, h, n, t, d)
    if before.shape[2]:
        out += (weights[1] @ before.reshape(p * h, -1, d)).view(p, h, n, t, d)
    return out


def _gathered(weights: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Do the reverse of _mixed: spread x, (p, h, n, r, t, D), over the past and the prompt.

    Returns:
        (p, h, n, b, D) and (p, h, l, D).
    """
    p, h, n, r, t, d = x.shape
    # The small factor is the one that is transposed, because transposing copies it.
    own = x.reshape(p * h * n, r * t, d).mT @ weights[0]
    before = x.reshape(p * h, n * r * t, d).mT @ weights[1]
    return own.mT.unflatten(0, (p, h, n)), before.mT.unflatten(0, (p, h))
