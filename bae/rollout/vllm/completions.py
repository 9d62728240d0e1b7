"""Share what both vLLM engines need: seeds, checks, and a way to put completions together."""

from dataclasses import dataclass

import numpy as np
import torch

from bae.batch import SampledTokens
from bae.rollout.interface import SamplingRequest


@dataclass(frozen=True)
class Finished:
    """Hold one completion.

    Attributes:
        ids: its token ids, with the end of sequence if it ended.
        ended: whether the end of sequence was sampled.
        log_probs: one of each token, in nats; None if they were not asked for.
    """

    ids: list[int]
    ended: bool
    log_probs: list[float] | None


def seeds(key: tuple[int, ...], group_size: int) -> list[int]:
    """Return one seed below 2**63 for each completion of a group. A seed does not depend on the group's size."""
    return [int(seed) >> 1 for seed in np.random.SeedSequence(key).generate_state(group_size, np.uint64)]


def to_samples(request: SamplingRequest, completions: list[Finished]) -> SampledTokens:
    """Pad the N completions of a request, which come group by group, to tensors."""
    prompt_ids, prompt_mask = request.padded_prompts()
    width = max(len(completion.ids) for completion in completions)
    ids = torch.full((len(completions), width), request.pad_token_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    log_probs = torch.zeros(ids.shape)
    for n, completion in enumerate(completions):
        length = len(completion.ids)
        ids[n, :length] = torch.tensor(completion.ids)
        mask[n, :length] = True
        if completion.log_probs is not None:
            log_probs[n, :length] = torch.tensor(completion.log_probs)
    return SampledTokens(
        prompt_ids,
        prompt_mask,
        ids,
        mask,
        ended=torch.tensor([completion.ended for completion in completions]),
        log_probs=None if completions[0].log_probs is None else log_probs,
    )


def check_truncation(top_p: float, top_k: int) -> None:
    """Raise ValueError for values that leave nothing to sample from."""
    if not 0 < top_p <= 1:
        raise ValueError(f"rollout.top_p={top_p}: must be above 0 and at most 1")
    if top_k < 0:
        raise ValueError(f"rollout.top_k={top_k}: must be 0 (all tokens) or more")


def check_lengths(request: SamplingRequest, limit: int) -> None:
    """Raise ValueError if the longest prompt and its completion may not fit into the context of `limit` tokens."""
    longest = max(map(len, request.prompts))
    if longest + request.max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={request.max_new_tokens} are more than the {limit} "
            "tokens of the context; lower max_new_tokens, or raise the limit (rollout.max_model_len, or the server's "
            "--max-model-len)"
        )
