"""Cached decoding in this process, with the very weights that are being trained."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bae.batch import Samples


class LocalEngine:
    """Prefills each prompt once, then decodes its whole group; finished rows leave once they are the majority.

    max_rows: completions decoded at a time, to bound the memory of the cache; rounded down to whole groups.
    """

    def __init__(self, max_rows: int = 512):
        if max_rows < 1:
            raise ValueError(f"rollout.max_rows={max_rows}: must be 1 or more")
        self.max_rows = max_rows

    @torch.no_grad()  # not inference_mode: the ids return in the training pass, which keeps them for backward
    def sample(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[tuple[int, ...]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        eos_token_id: int,
        pad_token_id: int,
    ) -> Samples:
        prompt_ids, prompt_mask = pad_left(prompts, pad_token_id)
        uniforms = torch.from_numpy(
            np.stack([np.random.default_rng(key).random((group_size, max_new_tokens), np.float32) for key in keys])
        )
        at_a_time = max(1, self.max_rows // group_size)
        parts = [
            _decode(
                model,
                prompt_ids[i : i + at_a_time].to(model.device),
                prompt_mask[i : i + at_a_time].to(model.device),
                uniforms[i : i + at_a_time].flatten(0, 1).to(model.device),
                temperature,
                eos_token_id,
                pad_token_id,
            )
            for i in range(0, len(prompts), at_a_time)
        ]
        ids = torch.cat(parts).cpu()
        is_eos = ids == eos_token_id
        mask = (is_eos.cumsum(1) - is_eos.long()) == 0  # everything up to and including the first end of sequence
        ids, mask = ids[:, : int(mask.sum(1).max())], mask[:, : int(mask.sum(1).max())]
        return Samples(
            prompt_ids.repeat_interleave(group_size, 0),
            prompt_mask.repeat_interleave(group_size, 0),
            ids.masked_fill(~mask, pad_token_id),
            mask,
            is_eos.any(1),
        )


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(R, L) ids padded on the left and their bool mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


def _decode(
    model: Any, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, temperature: float, eos: int, pad: int
) -> Tensor:
    """(P, L) prompts and (N, T) uniform draws -> (N, T) ids; whatever follows an end of sequence is padding."""
    rows, limit = uniforms.shape
    group = rows // len(prompt_ids)
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = out.past_key_values
    cache.batch_repeat_interleave(group)
    logits = out.logits[:, -1].repeat_interleave(group, 0)
    mask = prompt_mask.long().repeat_interleave(group, 0)
    next_position = mask.sum(1)
    alive = torch.arange(rows, device=prompt_ids.device)  # rows of `ids` that the cache still holds
    done = torch.zeros_like(alive, dtype=torch.bool)
    ids = torch.full((rows, limit), pad, device=prompt_ids.device)
    for t in range(limit):
        token = pick(logits, uniforms[alive, t], temperature).masked_fill(done, pad)
        ids[alive, t] = token
        done = done | (token == eos)
        if t + 1 == limit or done.all():
            break
        if done.sum() * 2 > len(alive):
            keep = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            alive, done, token = alive[keep], done[keep], token[keep]
            mask, next_position = mask[keep], next_position[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(
            input_ids=token.unsqueeze(1),
            attention_mask=mask,
            position_ids=next_position.unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits, next_position = out.logits[:, -1], next_position + 1
    return ids


def pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw one token a row by inverting its cumulative distribution; (R, V), (R,) -> (R,).

    The draw is a function of the row's logits and number alone. Temperature 0 takes the most likely token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total, so that rounding never points past the last token that has any probability.
    target = torch.minimum(uniform.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)
