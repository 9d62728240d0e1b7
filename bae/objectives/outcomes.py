"""Outcomes of a prefix: what a conditioned baseline conditions on, any discrete function of it.

A user's own is any callable (completions, given, group, …) -> (N,) numbers, equal for equal outcomes, named in a yaml
by `_target_`: completions are those of whole groups; given, (N,), is the reward of the objective that a later one names
as `given`; group, (N,), is the prompt. It must not look at the block that is judged, or at a later one.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bae.batch import Completion
from bae.method.baselines import stratified_mean
from bae.text.verdict import Verdict


class Outcome(Protocol):
    """See the module."""

    def __call__(self, completions: Sequence[Completion], given: Tensor, group: Tensor) -> Tensor: ...


def given_reward(completions: Sequence[Completion], given: Tensor, group: Tensor) -> Tensor:
    """The reward of the objective named as `given`: correct or not, in the paper."""
    return given


def verdict(completions: Sequence[Completion], given: Tensor, group: Tensor) -> Tensor:
    """The verifier's word on the first answer: correct, wrong, unparseable, timeout; or that there is none."""
    order = list(Verdict)
    return torch.tensor([float(order.index(c.verdicts[0])) if c.verdicts else -1.0 for c in completions])


def answer_length(completions: Sequence[Completion], given: Tensor, group: Tensor, edges: Sequence[int]) -> Tensor:
    """The given reward, times the bin of the answer's length in characters. edges: where the next bin begins."""
    lengths = [len((c.answer() or "").strip()) for c in completions]
    return crossed(torch.bucketize(torch.tensor(lengths), torch.tensor(list(edges)), right=True), given)


def group_accuracy(completions: Sequence[Completion], given: Tensor, group: Tensor, bins: int) -> Tensor:
    """The given reward, times the bin of the group's mean of it, 0 to 1: problems of like difficulty have an outcome in
    common. For a baseline across prompts: inside a group it splits nothing."""
    share = stratified_mean(given, group, torch.ones_like(group, dtype=torch.bool))
    return crossed((share * bins).long().clamp(max=bins - 1), given)


def crossed(bins: Tensor, given: Tensor) -> Tensor:
    """One number for each pair of outcomes; a function of the pair alone, so that it means the same in every step."""
    return 1000.0 * bins.double() + given
