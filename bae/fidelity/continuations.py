"""Sample later blocks of completions again, from their own prefixes.

These are nested rollouts, as in VinePPO (arXiv 2410.01679).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bae.batch import Problem, SampledTokens, Scored
from bae.rollout.interface import SamplingRequest
from bae.rollout.pipeline import Pipeline

BANDS = 8
"""The token limit is divided into so many equal parts. Prefixes whose lengths fall into the same part are continued
together."""


@dataclass(frozen=True)
class Continuations:
    """Hold M fresh ends for each of R completions.

    Attributes:
        rows: (R,) long, the completions that were continued, in order: those that reached the block.
        samples: R * M whole completions, prefix and fresh end, prefix by prefix.
        scored: their scores.
        rollouts: M.
    """

    rows: Tensor
    samples: SampledTokens
    scored: Scored
    rollouts: int

    def rewards(self, j: int) -> Tensor:
        """Return (R, M): the rewards of objective j, NaN where it is not present and enters no mean."""
        rewards = self.scored.rewards[:, j].where(self.scored.present[:, j], torch.nan)
        return rewards.reshape(len(self.rows), self.rollouts)


def resample(
    pipeline: Pipeline,
    problems: Sequence[Problem],
    samples: SampledTokens,
    block_of: Tensor,
    block: int,
    rollouts: int,
    keys: Sequence[tuple[int, ...]],
    max_rows: int | None = None,
) -> Continuations:
    """Sample `rollouts` new ends of each completion that reached block number `block`, from the block's first token on.

    What comes of a prefix depends on the prefix and its key alone.

    Args:
        pipeline: samples and scores. Its token limit holds for prefix and end together.
        problems: N, one for each completion.
        samples: N completions, as the pipeline gives them.
        block_of: (N, T) long, the block of each token.
        block: the number of the block.
        rollouts: M.
        keys: N, a seed for each completion.
        max_rows: completions asked of the engine at a time, rounded down to whole prefixes. None leaves it to the
            engine.

    Raises:
        ValueError: if `rollouts` is below 1.
    """
    if rollouts < 1:
        raise ValueError(f"rollouts={rollouts}: must be 1 or more")
    tokenizer, limit = pipeline.policy.tokenizer, pipeline.max_new_tokens
    rows = (block_of >= block).any(1).nonzero().squeeze(1)
    length = ((block_of >= 0) & (block_of < block))[rows].sum(1)  # of the prefixes
    owners = rows.repeat_interleave(rollouts)
    first = length.repeat_interleave(rollouts).unsqueeze(1)  # where the fresh tokens go
    mask = torch.arange(limit) < first
    ids = torch.full(mask.shape, tokenizer.pad_token_id)
    ids[mask] = samples.completion_ids[owners][mask[:, : samples.completion_ids.shape[1]]]
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for part, room in _bands(length, limit, max(1, (max_rows or len(ids)) // rollouts)):
        request = SamplingRequest(
            [_prompt(samples, int(rows[r]), int(length[r])) for r in part],
            [keys[n] for n in rows[part]],
            group_size=rollouts,
            max_new_tokens=room,
            temperature=pipeline.temperature,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        fresh = pipeline.engine.sample(pipeline.policy.model, request)
        to = (part.unsqueeze(1) * rollouts + torch.arange(rollouts)).flatten()
        at = first[to] + torch.arange(fresh.completion_ids.shape[1])
        kept = fresh.completion_mask & (at < limit)
        place = to.unsqueeze(1).expand_as(at)[kept], at[kept]
        ids[place], mask[place] = fresh.completion_ids[kept], True
        ended[to] = fresh.ended & (kept == fresh.completion_mask).all(1)
    longest = int(mask.any(0).sum())
    again = SampledTokens(
        samples.prompt_ids[owners], samples.prompt_mask[owners], ids[:, :longest], mask[:, :longest], ended
    )
    scored = pipeline.scorer([problems[n] for n in owners], again)
    return Continuations(rows, again, scored, rollouts)


def _bands(length: Tensor, limit: int, at_a_time: int) -> Iterator[tuple[Tensor, int]]:
    """Yield the numbers of prefixes that are continued together, and how many tokens the engine may sample for them.

    The engine pads the prompts of a call to the longest, and its draws depend on the call's limit. So both go by bands
    of length: there is little padding, and the limit follows from the prefix, whatever other prefixes there are.
    """
    width = -(-limit // BANDS)
    for band in (length // width).unique().tolist():
        for part in (length // width == band).nonzero().squeeze(1).split(at_a_time):
            yield part, limit - band * width


def _prompt(samples: SampledTokens, n: int, length: int) -> list[int]:
    """Return completion n's prompt, without padding, and its first `length` tokens."""
    return samples.prompt_ids[n][samples.prompt_mask[n]].tolist() + samples.completion_ids[n, :length].tolist()
