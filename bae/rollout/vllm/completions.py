"""What engines outside this process's model have in common: seeds, and completions put together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bae.batch import SampledTokens
from bae.rollout.interface import pad_left


@dataclass(frozen=True)
class Finished:
    """One completion. ids: with the end of sequence, if it ended. log_probs: of each token, None if not asked for."""

    ids: list[int]
    ended: bool
    log_probs: list[float] | None


def seeds(key: tuple[int, ...], group_size: int) -> list[int]:
    """One seed below 2**63 for each completion of a group; completion g's does not depend on the group's size."""
    return [int(seed) >> 1 for seed in np.random.SeedSequence(key).generate_state(group_size, np.uint64)]


def to_samples(prompts: Sequence[Sequence[int]], completions: Sequence[Finished], pad: int) -> SampledTokens:
    """P prompts and their N completions, group by group."""
    prompt_ids, prompt_mask = pad_left(prompts, pad)
    group = len(completions) // len(prompts)
    width = max(len(completion.ids) for completion in completions)
    ids = torch.full((len(completions), width), pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    log_probs = torch.zeros(ids.shape)
    for n, completion in enumerate(completions):
        length = len(completion.ids)
        ids[n, :length] = torch.tensor(completion.ids)
        mask[n, :length] = True
        if completion.log_probs is not None:
            log_probs[n, :length] = torch.tensor(completion.log_probs)
    return SampledTokens(
        prompt_ids.repeat_interleave(group, 0),
        prompt_mask.repeat_interleave(group, 0),
        ids,
        mask,
        torch.tensor([completion.ended for completion in completions]),
        None if completions[0].log_probs is None else log_probs,
    )


def check_truncation(top_p: float, top_k: int) -> None:
    """Raises ValueError for values that leave nothing to sample from."""
    if not 0 < top_p <= 1:
        raise ValueError(f"rollout.top_p={top_p}: must be above 0 and at most 1")
    if top_k < 0:
        raise ValueError(f"rollout.top_k={top_k}: must be 0 (all tokens) or more")


def check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, limit: int) -> None:
    """Raises ValueError if a prompt leaves too little of the context of `limit` tokens."""
    longest = max(map(len, prompts))
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are more than the {limit} tokens of the "
            "context; lower max_new_tokens, or raise the limit (rollout.max_model_len, or the server's --max-model-len)"
        )
