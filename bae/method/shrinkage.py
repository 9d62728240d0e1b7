"""Define the empirical-Bayes baseline: several estimates of a small stratum's mean, weighted by their precision."""

from typing import Any

import torch
from torch import Tensor

from bae.method.baselines import RewardView, mean_of_others, outcome_strata, stratified_mean, stratum_size

FLOOR = 1e-8
"""Is added to every variance, so that a stratum whose members all agree is trusted and nothing is divided by 0."""


class EmpiricalBayes:
    """Shrink OCB-LOO: average up to three estimates of E[r | prompt, outcome], weighted by their precision.

        estimate   what it is the mean of                                               its variance
        same       the others of the stratum                                            within / n
        opposite   the group's other outcomes, rescored under one's own, plus a shift   mismatch + within / n
        prior      all prompts with this outcome                                        between

    `same` leaves the completion itself out. `opposite` exists only if the reward is a scoring rule. The
    hyper-parameters of each outcome (mean and variances, by the method of moments) come from earlier steps. So the
    baseline does not depend on the completion itself, and is unbiased. In the first step there are no
    hyper-parameters: the baseline is `same`, and NaN for singletons.

    Args:
        decay: of the moving average of the hyper-parameters over steps, in [0, 1); 0 takes those of the last step.

    Raises:
        ValueError: if decay is outside [0, 1).
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"baseline.decay={decay}: must be at least 0 and below 1")
        self.decay = decay
        self.moments: dict[float, dict[str, float]] = {}

    def __call__(self, rewards: RewardView) -> Tensor:
        """Return the baseline of each completion, (N,), and update the hyper-parameters with these rewards."""
        strata, present = outcome_strata(rewards), rewards.present
        same, members = mean_of_others(rewards.reward, strata, present), stratum_size(strata, present)
        opposite, others = _opposite(rewards, strata)
        baseline = torch.full_like(rewards.reward, torch.nan)
        fresh = {}
        for outcome in rewards.outcome.unique().tolist():
            mine = (rewards.outcome == outcome) & present
            known = self.moments.get(outcome)
            baseline[mine] = (
                same[mine]
                if known is None
                else _pool(known, same[mine], members[mine] - 1, opposite[mine], others[mine])
            )
            fresh[outcome] = _moments(rewards.reward[mine], strata[mine], opposite[mine], others[mine])
        self._remember(fresh)
        return baseline

    def _remember(self, fresh: dict[float, dict[str, float]]) -> None:
        """Move the averages of the hyper-parameters towards those of this step, {outcome: {name: value}}."""
        for outcome, moments in fresh.items():
            known = self.moments.get(outcome, {})
            mixed = {
                name: self.decay * known.get(name, value) + (1 - self.decay) * value for name, value in moments.items()
            }
            if known or mixed:
                self.moments[outcome] = known | mixed

    def state_dict(self) -> dict[str, Any]:
        """Return the hyper-parameters, for a checkpoint."""
        return {"moments": {outcome: dict(moments) for outcome, moments in self.moments.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the hyper-parameters that `state_dict` returned."""
        self.moments = {outcome: dict(moments) for outcome, moments in state["moments"].items()}


def _opposite(rewards: RewardView, strata: Tensor) -> tuple[Tensor, Tensor]:
    """Rescore the group's members of other strata under each completion's own outcome.

    Returns:
        The mean of these rewards and the number of these members, (N,) each; 0 and 0 if the reward is no scoring rule.
    """
    nothing = torch.zeros_like(rewards.reward)
    if rewards.rescored is None or rewards.correct is None:
        return nothing, nothing
    present, group = rewards.present, rewards.group
    inside, all_ = stratum_size(strata, present), stratum_size(group, present)
    columns = []
    for c in (0, 1):
        column = rewards.rescored[:, c]
        total = stratified_mean(column, group, present) * all_ - stratified_mean(column, strata, present) * inside
        columns.append(total / (all_ - inside).clamp(min=1))
    return torch.where(rewards.correct == 1, columns[1], columns[0]), (all_ - inside).to(nothing)


def _pool(m: dict[str, float], same: Tensor, n_same: Tensor, opposite: Tensor, n_opposite: Tensor) -> Tensor:
    """Average the estimates that exist, weighted by their precision; m: the hyper-parameters of the outcome."""
    estimates = [(torch.full_like(same, m["mean"]), torch.full_like(same, 1 / (m["between"] + FLOOR)))]
    estimates.append((same.nan_to_num(), n_same / (m["within"] + FLOOR)))
    if "mismatch" in m:
        variance = m["mismatch"] + m["within"] / n_opposite.clamp(min=1) + FLOOR
        estimates.append((opposite + m["shift"], (n_opposite > 0) / variance))
    weight = torch.stack([w for _, w in estimates])
    return (torch.stack([e for e, _ in estimates]) * weight).sum(0) / weight.sum(0)


def _moments(reward: Tensor, strata: Tensor, opposite: Tensor, others: Tensor) -> dict[str, float]:
    """Estimate the hyper-parameters of one outcome by a one-way analysis of variance of its strata.

    Args:
        reward: (M,), of the M present completions with this outcome.
        strata: (M,) long.
        opposite, others: (M,) each, as _opposite returns them; they give `shift` and `mismatch`.

    Returns:
        {name: value}. It is empty if there are fewer than two strata, or if no stratum has two members.
    """
    labels, index, n = strata.unique(return_inverse=True, return_counts=True)
    total, k = len(reward), len(labels)
    if k < 2 or total <= k:
        return {}

    def sums(values: Tensor) -> Tensor:
        return torch.zeros(k, dtype=values.dtype).index_add(0, index, values)

    mean = sums(reward) / n
    within = float(((reward - mean[index]) ** 2).sum() / (total - k))
    grand = reward.mean()
    spread = float((n * (mean - grand) ** 2).sum() / (k - 1))
    size = float((total - (n**2).sum() / total) / (k - 1))
    found = {"mean": float(grand), "within": within, "between": max(0.0, (spread - within) / size)}
    n_opposite = sums(others) / n
    both = n_opposite > 0
    if both.sum() < 2:
        return found
    gap = (mean - sums(opposite) / n)[both]
    noise = (within / n[both] + within / n_opposite[both]).mean()
    return found | {"shift": float(gap.mean()), "mismatch": max(0.0, float(gap.var() - noise))}
