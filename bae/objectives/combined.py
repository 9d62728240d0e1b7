"""One scalar of several rewards: what the scalar comparators (RLCR, RLVR+BCE, weighted-sum GRPO) are made of."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bae.batch import Completion

Reward = Callable[[Completion], float | None]


def weighted_sum(completion: Completion, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> float | None:
    """The sum of w r over the rewards; None if one of them has nothing to score. KeyError if one has no weight."""
    total = 0.0
    for name, reward in rewards.items():
        value = reward(completion)
        if value is None:
            return None
        total += weights[name] * value
    return total


def scored(completion: Completion, score: Callable[[Tensor, Tensor], Tensor]) -> float | None:
    """A scoring rule as a reward: of the first confidence, about the first answer; None without either."""
    if not completion.verdicts or completion.confidence is None:
        return None
    return float(score(torch.tensor(completion.confidence), torch.tensor(float(completion.correct))))
