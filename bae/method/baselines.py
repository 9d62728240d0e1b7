"""Baselines: what each reward is compared with. Pure torch.

The paper's baselines and their leave-one-out forms are one kernel, the mean over a stratum. A baseline only chooses
the strata. A user's own baseline is any callable (RewardView) -> (N,), named in a yaml by `_target_`. With
`state_dict` and `load_state_dict` it may carry something from step to step. docs/baselines.md compares them.

A baseline that needs the policy's own distribution is a `bae.objectives.refining.RefiningBaseline`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardView:
    """Hold the rewards of one objective over the whole batch, all ranks together, and what strata can be made of.

    Attributes:
        reward: (N,).
        group: (N,) long, the prompt.
        outcome: (N,) any numbers, the outcome of the prefix; all equal if the objective conditions on none.
        present: (N,) bool, the completions that count.
        correct: (N,) long, whether the answer that the objective is about is right.
        rescored: (N, 2), what the reward would have been if the answer had been wrong, and right. None if the reward
            is not a scoring rule of a stated number.
        resample: n -> (N, n), rewards of n fresh samples of the block from each completion's own prefix.
        expected: (N,), the reward that the policy's own distribution over the number promises, NaN where it is not
            known. None in training, where the training pass finds it.
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
    """Give each completion a baseline: (RewardView) -> (N,), NaN where there is none.

    The fallback baseline steps in for NaN. Values where `present` is False are not used.
    """

    def __call__(self, rewards: RewardView) -> Tensor: ...


def stratified_mean(reward: Tensor, stratum: Tensor, present: Tensor) -> Tensor:
    """Return the mean reward over the present members of each completion's stratum, itself included.

    Args:
        reward: (N,).
        stratum: (N,) long, any labels.
        present: (N,) bool.

    Returns:
        (N,). An empty stratum has mean 0.

    Raises:
        ValueError: if the shapes differ.
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
    """Return (N,) long: how many present members each completion's stratum has."""
    labels, index = stratum.unique(return_inverse=True)
    return torch.bincount(index[present], minlength=len(labels))[index]


def mean_of_others(reward: Tensor, stratum: Tensor, present: Tensor) -> Tensor:
    """Return (N,): the mean reward over the other present members of the stratum, NaN where there are none."""
    mean, size = stratified_mean(reward, stratum, present), stratum_size(stratum, present)
    return torch.where(size > 1, mean + (mean - reward) / (size - 1).clamp(min=1), torch.nan)


def none(rewards: RewardView) -> Tensor:
    """Return b = 0: the raw reward is the advantage (paper, baseline 1)."""
    return torch.zeros_like(rewards.reward)


def batch_mean(rewards: RewardView) -> Tensor:
    """Return the mean over the whole batch, across prompts and ranks (paper, baseline 2)."""
    return stratified_mean(rewards.reward, torch.zeros_like(rewards.group), rewards.present)


def group_mean(rewards: RewardView) -> Tensor:
    """Return the mean over the prompt's group, as in GRPO (paper, baseline 3)."""
    return stratified_mean(rewards.reward, rewards.group, rewards.present)


def outcome_conditioned(rewards: RewardView) -> Tensor:
    """Return OCB: the mean over the group's members with the same prefix outcome, itself included (paper, baseline 4).

    A completion alone in its stratum gets advantage 0, as in the paper. Including itself keeps 1 - 1/n of the signal
    in a stratum of n, so rare strata keep less. This biases the confidence away from 1/2. The paper's main runs do it.
    """
    return stratified_mean(rewards.reward, outcome_strata(rewards), rewards.present)


def outcome_over_batch(rewards: RewardView) -> Tensor:
    """Return the mean over the completions of the whole batch with the same prefix outcome.

    With an outcome of many bins, such as correctness and the group's accuracy, the strata are large, and the
    completions of a stratum are alike.
    """
    return stratified_mean(rewards.reward, _labels(rewards.outcome), rewards.present)


def leave_one_out(rewards: RewardView) -> Tensor:
    """Return OCB without the completion itself: the mean over the others with the same prefix outcome, NaN alone.

    It is unbiased, because it does not depend on what the completion itself drew.
    """
    return mean_of_others(rewards.reward, outcome_strata(rewards), rewards.present)


@dataclass(frozen=True)
class MonteCarlo:
    """Average fresh samples of the block from the completion's own prefix (VinePPO, arXiv 2410.01679).

    It is unbiased, and as precise as one pays for.

    Args:
        rollouts: fresh samples of each prefix.

    Raises:
        ValueError: if rollouts is below 1; and when it is called where nothing can sample.
    """

    rollouts: int

    def __post_init__(self) -> None:
        if self.rollouts < 1:
            raise ValueError(f"baseline.rollouts={self.rollouts}: must be 1 or more")

    def __call__(self, rewards: RewardView) -> Tensor:
        if rewards.resample is None:
            raise ValueError("baseline monte_carlo needs a policy to sample from, and there is none here")
        return rewards.resample(self.rollouts).nanmean(1)


def without_self(rewards: RewardView) -> Tensor:
    """Return a baseline from others, for completions whose own stratum has none: the default fallback.

    Where the reward is a scoring rule, it is the mean of the group's other reports, scored under one's own outcome.
    Otherwise it is the mean over the others of the batch with one's outcome, and NaN if there are none.
    """
    over_batch = mean_of_others(rewards.reward, _labels(rewards.outcome), rewards.present)
    if rewards.rescored is None or rewards.correct is None:
        return over_batch
    columns = [mean_of_others(rewards.rescored[:, c], rewards.group, rewards.present) for c in (0, 1)]
    in_group = torch.where(rewards.correct == 1, columns[1], columns[0])
    return torch.where(in_group.isnan(), over_batch, in_group)


def with_fallback(baseline: Baseline, fallback: Baseline, rewards: RewardView) -> tuple[Tensor, Tensor]:
    """Return (N,) baselines, and (N,) bool: where the first baseline had none.

    Where the fallback has none either, the reward is its own baseline, and the advantage is 0. Raises ValueError for a
    baseline that does not give one number for each completion.
    """
    value = baseline(rewards)
    if not isinstance(value, Tensor) or value.shape != rewards.reward.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"baseline: it gave {shape} for {len(rewards.reward)} completions; it must give (N,) numbers")
    lacking = value.isnan() & rewards.present
    if lacking.any():
        value = torch.where(lacking, fallback(rewards), value)
    return torch.where(value.isnan(), rewards.reward, value), lacking


def outcome_strata(rewards: RewardView) -> Tensor:
    """Return (N,) long: one label for each pair of group and outcome."""
    return strata_of(rewards.group, rewards.outcome)


def strata_of(group: Tensor, outcome: Tensor) -> Tensor:
    """Return (N,) long: one label for each pair of group, (N,) long, and outcome, (N,) any numbers."""
    labels = _labels(outcome)
    return group * (int(labels.max()) + 1 if len(labels) else 1) + labels


def has_signal_alone(baseline: Baseline, fallback: Baseline) -> bool:
    """Tell whether a baseline leaves any advantage if each prompt has one completion.

    It is asked about a small invented batch of such prompts, so a user's own baseline is judged as any other. Raises
    what the baseline raises, and ValueError as `with_fallback` does.
    """
    reward = torch.tensor([-0.81, -0.36, -0.09, -0.01])
    outcome = torch.tensor([0.0, 0.0, 1.0, 1.0])
    rescored = torch.stack([reward, reward.flip(0)], 1)
    everyone, present = torch.arange(4), torch.ones(4, dtype=torch.bool)
    view = RewardView(
        reward, everyone, outcome, present, outcome.long(), rescored, lambda n: torch.full((4, n), reward.mean().item())
    )
    value, _ = with_fallback(copy.deepcopy(baseline), fallback, view)  # a copy, so that nothing is learnt
    return bool((value != reward).any())


def state_of(baseline: Baseline) -> dict[str, Any]:
    """Return what a baseline carries from step to step, as plain numbers for checkpoints."""
    state: dict[str, Any] = baseline.state_dict() if hasattr(baseline, "state_dict") else {}
    return state


def load_state(baseline: Baseline, state: dict[str, Any]) -> None:
    """Give a baseline back what it carried."""
    if hasattr(baseline, "load_state_dict"):
        baseline.load_state_dict(state)


def _labels(outcome: Tensor) -> Tensor:
    """Return (N,) long: equal labels for equal outcomes, from 0 on."""
    labels: Tensor = outcome.unique(return_inverse=True)[1]
    return labels
