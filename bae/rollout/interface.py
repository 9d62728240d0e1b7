"""What a rollout engine is: from prompts to sampled completions."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bae.batch import SampledTokens

OnFinished = Callable[[int, Sequence[int], bool], None]
"""(number of a completion, its token ids up to and including the end of sequence, whether it ended)"""


class RolloutEngine(Protocol):
    """Samples groups of completions from the policy as it is now."""

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
        on_finished: OnFinished | None = None,
    ) -> SampledTokens:
        """Sample G completions of each of P prompts.

        model: the policy, a transformers causal language model.
        prompts: P lists of token ids. keys: P seeds; a group's draws depend on its key alone, not on what else is
        in the batch, so any rank can repeat any group.
        on_finished: called in this thread for each completion as soon as it is done, so that others can begin with it.
        Returns N = P * G completions, group by group.
        """
        ...


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(R, L) ids padded on the left and their bool mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return ids, mask
