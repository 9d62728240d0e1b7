"""Define what a rollout engine is: it takes a sampling request and returns sampled completions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bae.batch import SampledTokens
from bae.training.causal_lm import CausalLM


@dataclass(frozen=True)
class SamplingRequest:
    """Ask for G completions of each of P prompts.

    Attributes:
        prompts: P lists of token ids.
        keys: P seeds. The draws of a group depend on its key alone, and not on what else is in the batch, so any rank
            can repeat any group.
        group_size: G.
        max_new_tokens: tokens that a completion may have.
        temperature: of sampling. At 0 the most likely token is taken.
        eos_token_id: the token that ends a completion.
        pad_token_id: the token that fills up shorter rows.
        on_finished: called in the thread of `sample` for each completion as soon as it is done, so that others can
            begin to work on it. Its arguments are the number of the completion (0 to N - 1), its token ids up to and
            with the end of sequence, and whether the end of sequence was sampled.
    """

    prompts: Sequence[Sequence[int]]
    keys: Sequence[tuple[int, ...]]
    group_size: int
    max_new_tokens: int
    temperature: float
    eos_token_id: int
    pad_token_id: int
    on_finished: Callable[[int, Sequence[int], bool], None] | None = None

    def padded_prompts(self) -> tuple[Tensor, Tensor]:
        """Return the prompt of every completion, (N, L) ids padded on the left, and the bool mask of the same shape."""
        ids, mask = pad_left(self.prompts, self.pad_token_id)
        return ids.repeat_interleave(self.group_size, 0), mask.repeat_interleave(self.group_size, 0)


class RolloutEngine(Protocol):
    """Sample groups of completions from the policy as it is now."""

    def sample(self, model: CausalLM, request: SamplingRequest) -> SampledTokens:
        """Sample N = P * G completions.

        Args:
            model: the policy.
            request: the prompts and how to sample.

        Returns:
            The completions, group by group.
        """
        ...


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad R rows of token ids on the left, and return the (R, L) ids and their bool mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return ids, mask
