"""Outcomes of a prefix: what a conditioned baseline conditions on, any discrete function of the prefix.

A user's own outcome is any callable (completions, given, group, …) -> (N,) numbers, named in a yaml by `_target_`.
Equal numbers mean equal outcomes. It must not look at the block that is judged, or at a later one.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bae.batch import Completion
from bae.method.baselines import stratified_mean
from bae.text.verdict import Verdict

BIN = 1000.0
"""The distance between the outcomes of two bins; above any given reward."""


class Outcome(Protocol):
    """Give each completion the outcome of its prefix."""

    def __call__(self, completions: Sequence[Completion], given: Tensor, group: Tensor) -> Tensor:
        """Return (N,) numbers.

        Args:
            completions: N completions of whole groups.
            given: (N,), the reward of the objective that a later one names as `given`.
            group: (N,) long, the prompt.
        """
        ...


def given_reward(completions: Sequence[Completion], given: Tensor, group: Tensor) -> Tensor:
    """Return the reward of the objective named as `given`: correct or not, in the paper."""
    return given


def verdict(completions: Sequence[Completion], given: Tensor, group: Tensor) -> Tensor:
    """Return the verdict on the first answer (correct, wrong, unparseable, timeout), -1 without an answer."""
    order = list(Verdict)
    return torch.tensor([float(order.index(c.verdicts[0])) if c.verdicts else -1.0 for c in completions])


def answer_length(completions: Sequence[Completion], given: Tensor, group: Tensor, edges: Sequence[int]) -> Tensor:
    """Cross the given reward with a bin of the answer's length in characters; edges: where the next bin begins."""
    lengths = [len((c.answer() or "").strip()) for c in completions]
    return crossed(torch.bucketize(torch.tensor(lengths), torch.tensor(list(edges)), right=True), given)


def group_accuracy(completions: Sequence[Completion], given: Tensor, group: Tensor, bins: int) -> Tensor:
    """Cross the given reward with a bin of its mean over the group, from 0 to 1.

    Problems of like difficulty then share an outcome. It is for a baseline across prompts: inside a group it splits
    nothing.
    """
    share = stratified_mean(given, group, torch.ones_like(group, dtype=torch.bool))
    return crossed((share * bins).long().clamp(max=bins - 1), given)


def crossed(bins: Tensor, given: Tensor) -> Tensor:
    """Return one number for each pair of bin and given reward, which means the same in every step."""
    return BIN * bins.double() + given
