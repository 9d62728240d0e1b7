"""Baselines: what each reward is compared with. Pure torch.

The paper's baselines, and leaving oneself out of them, are one kernel, the mean over a stratum; a baseline only chooses
the strata. A user's own is any callable (RewardView) -> (N,), named in a yaml by `_target_`; with `state_dict` and
`load_state_dict` it may carry something from step to step. docs/baselines.md compares them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardView:
    """One objective's rewards over the whole batch, all ranks together, and what strata can be made of.

    reward: (N,). group: (N,) long, the prompt. outcome: (N,) any numbers, the outcome of the prefix, all equal where
    the objective conditions on none. present: (N,) bool, the completions that count.
    correct: (N,) long, whether the first answer is right.
    rescored: (N, 2), what the reward would have been had the first answer been wrong, and right; None where the reward
        is no scoring rule of a stated number.
    resample: n -> (N, n), rewards of n fresh samples of the block from each completion's own prefix.
    expected: (N,), the reward that the policy's own distribution over the number promises, NaN where it does not say;
        None in training, where the training step finds it out.
    """

    reward: Tensor
    group: Tensor
    outcome: Tensor
    present: Tensor
    correct: Tensor | None = None
    rescored: Tensor | None = None
    resample: Callable[[int], Tensor] | None = None
    expected: Tensor | None = None


class Baseline(Protocol):
    """(RewardView) -> (N,): the baseline of each completion, NaN where it has none: the fallback baseline steps in.
    What it gives where `present` is False is unused."""

    def __call__(self, rewards: RewardView) -> Tensor: ...


def stratified_mean(reward: Tensor, stratum: Tensor, present: Tensor) -> Tensor:
    """Mean reward over the present members of each completion's stratum, itself included; (N,).

    reward: (N,). stratum: (N,) long, any labels. present: (N,) bool. An empty stratum has mean 0.
    """
    if not reward.shape == stratum.shape == present.shape:
        raise ValueError(f"shapes differ: reward {reward.shape}, stratum {stratum.shape}, present {present.shape}")
    _, index = stratum.unique(return_inverse=True)
    size = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=reward.dtype, device=reward.device)
    # Deviations from the smallest member keep a constant stratum's mean exact: "no signal" is exactly zero.
    origin = size.scatter_reduce(0, index[present], reward[present], reduce="amin", include_self=False)
    total = size.index_add(0, index[present], (reward - origin[index])[present])
    return (origin + total / size.index_add(0, index[present], torch.ones_like(reward)[present]).clamp(min=1))[index]


def stratum_size(stratum: Tensor, present: Tensor) -> Tensor:
    """(N,) long: how many present members each completion's stratum has."""
    labels, index = stratum.unique(return_inverse=True)
    return torch.bincount(index[present], minlength=len(labels))[index]


def mean_of_others(reward: Tensor, stratum: Tensor, present: Tensor) -> Tensor:
    """Mean reward over the other present members of the stratum; NaN where there are none; (N,)."""
    mean, size = stratified_mean(reward, stratum, present), stratum_size(stratum, present)
    return torch.where(size > 1, mean + (mean - reward) / (size - 1).clamp(min=1), torch.nan)


def none(rewards: RewardView) -> Tensor:
    """b = 0: the raw reward is the advantage (paper, baseline 1)."""
    return torch.zeros_like(rewards.reward)


def batch_mean(rewards: RewardView) -> Tensor:
    """Mean over the whole batch, across prompts and ranks (paper, baseline 2)."""
    return stratified_mean(rewards.reward, torch.zeros_like(rewards.group), rewards.present)


def group_mean(rewards: RewardView) -> Tensor:
    """Mean over the prompt's group, as GRPO has it (paper, baseline 3)."""
    return stratified_mean(rewards.reward, rewards.group, rewards.present)


def outcome_conditioned(rewards: RewardView) -> Tensor:
    """OCB: mean over the group's members with the same prefix outcome, itself included (paper, baseline 4).

    A completion alone in its stratum gets advantage 0, as in the paper. The self-inclusion keeps 1 - 1/n of the signal
    in a stratum of n, less in rare strata, and so biases the confidence away from 1/2; the paper's main runs have it.
    """
    return stratified_mean(rewards.reward, outcome_strata(rewards), rewards.present)


def outcome_over_batch(rewards: RewardView) -> Tensor:
    """Mean over the completions of the whole batch with the same prefix outcome; with an outcome of many bins, such as
    correctness and the group's accuracy, the strata are large and each is alike."""
    return stratified_mean(rewards.reward, _labels(rewards.outcome), rewards.present)


def leave_one_out(rewards: RewardView) -> Tensor:
    """OCB without the completion itself, so unbiased: mean over the others with the same prefix outcome. NaN alone."""
    return mean_of_others(rewards.reward, outcome_strata(rewards), rewards.present)


def monte_carlo(rewards: RewardView, rollouts: int) -> Tensor:
    """Mean over fresh samples of the block from the completion's own prefix (VinePPO, arXiv 2410.01679): unbiased, as
    precise as one pays for. Raises ValueError where nothing can sample."""
    if rewards.resample is None:
        raise ValueError("baseline monte_carlo: needs a policy to sample from, and there is none here")
    return rewards.resample(rollouts).nanmean(1)


def without_self(rewards: RewardView) -> Tensor:
    """The fallback: a baseline of others where the own stratum has none, whatever the completion itself stated.

    The other reports of the group scored under one's own outcome, where the reward is a scoring rule; else the others
    of the batch with one's outcome; NaN if there are none either.
    """
    over_batch = mean_of_others(rewards.reward, _labels(rewards.outcome), rewards.present)
    if rewards.rescored is None or rewards.correct is None:
        return over_batch
    columns = [mean_of_others(rewards.rescored[:, c], rewards.group, rewards.present) for c in (0, 1)]
    in_group = torch.where(rewards.correct == 1, columns[1], columns[0])
    return torch.where(in_group.isnan(), over_batch, in_group)


@dataclass
class RaoBlackwell:
    """The policy's own expectation of the reward, over the number that it may state.

    In training, the tokens of the number are judged against the expectation before each of them, and the text before
    the number by that expectation minus `text`; see bae.method.stated_numbers. Here: the expectation where it is
    known, else `text`.

    text: baseline of what stands before the number; it must leave the completion itself out.
    all_action: the number learns from the expected reward of every token that might have been drawn, with no noise of
        sampling; else from the one that was.
    """

    text: Baseline
    all_action: bool = False

    def __call__(self, rewards: RewardView) -> Tensor:
        text = self.text(rewards)
        return text if rewards.expected is None else torch.where(rewards.expected.isnan(), text, rewards.expected)

    def state_dict(self) -> dict[str, Any]:
        return state_of(self.text)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_state(self.text, state)


def with_fallback(baseline: Baseline, fallback: Baseline, rewards: RewardView) -> tuple[Tensor, Tensor]:
    """(N,) baselines, and (N,) bool where the first had none. Where the fallback has none either the reward is its own
    baseline, and the advantage 0."""
    value = baseline(rewards)
    lacking = value.isnan() & rewards.present
    if lacking.any():
        value = torch.where(lacking, fallback(rewards), value)
    return torch.where(value.isnan(), rewards.reward, value), lacking


def outcome_strata(rewards: RewardView) -> Tensor:
    """(N,) long: one label for each pair of group and outcome."""
    outcome = _labels(rewards.outcome)
    return rewards.group * (int(outcome.max()) + 1 if len(outcome) else 1) + outcome


def _labels(outcome: Tensor) -> Tensor:
    return outcome.unique(return_inverse=True)[1]


def state_of(baseline: Baseline) -> dict[str, Any]:
    """What a baseline carries from step to step; plain numbers, for checkpoints."""
    return baseline.state_dict() if hasattr(baseline, "state_dict") else {}


def load_state(baseline: Baseline, state: dict[str, Any]) -> None:
    if hasattr(baseline, "load_state_dict"):
        baseline.load_state_dict(state)
