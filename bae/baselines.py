"""Baselines: what each reward is compared with. Pure torch.

All of the paper's baselines are one kernel, the mean over a stratum; a baseline only chooses the strata.
A user's own is any callable (BlockRewards) -> (N,), named in a yaml by `_target_`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockRewards:
    """One objective's rewards over the whole batch, all ranks together, and what strata can be made of.

    reward: (N,). group: (N,) long, the prompt. outcome: (N,) long, the outcome of the prefix, all zero where the
    objective conditions on none. present: (N,) bool, the completions that count.
    """

    reward: Tensor
    group: Tensor
    outcome: Tensor
    present: Tensor


class Baseline(Protocol):
    """(BlockRewards) -> (N,): the baseline of each completion. What it gives where `present` is False is unused."""

    def __call__(self, rewards: BlockRewards) -> Tensor: ...


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
    count = size.index_add(0, index[present], torch.ones_like(reward)[present])
    return (origin + total / count.clamp(min=1))[index]


def none(rewards: BlockRewards) -> Tensor:
    """b = 0: the raw reward is the advantage (paper, baseline 1)."""
    return torch.zeros_like(rewards.reward)


def batch_mean(rewards: BlockRewards) -> Tensor:
    """Mean over the whole batch, across prompts and ranks (paper, baseline 2)."""
    return stratified_mean(rewards.reward, torch.zeros_like(rewards.group), rewards.present)


def group_mean(rewards: BlockRewards) -> Tensor:
    """Mean over the prompt's group, as GRPO has it (paper, baseline 3)."""
    return stratified_mean(rewards.reward, rewards.group, rewards.present)


def outcome_conditioned(rewards: BlockRewards) -> Tensor:
    """OCB: mean over the group's members with the same prefix outcome, itself included (paper, baseline 4).

    A completion alone in its stratum gets advantage 0, as in the paper. The self-inclusion biases the confidence
    away from 1/2 (by 1/(2G) and more); the paper's main runs have it, so it is kept as it is.
    """
    return stratified_mean(rewards.reward, outcome_strata(rewards), rewards.present)


def outcome_strata(rewards: BlockRewards) -> Tensor:
    """(N,) long: one label for each pair of group and outcome."""
    outcomes = int(rewards.outcome.max()) + 1 if len(rewards.outcome) else 1
    return rewards.group * outcomes + rewards.outcome
