"""One scalar made of several rewards, for the scalar comparators (RLCR, RLVR+BCE, weighted-sum GRPO)."""

from collections.abc import Mapping

import torch

from bae.batch import Completion
from bae.objectives import Reward, Score


def weighted_sum(completion: Completion, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> float | None:
    """Return the sum of w r over the rewards; None if one of them has nothing to score.

    Raises KeyError if a reward has no weight.
    """
    total = 0.0
    for name, reward in rewards.items():
        value = reward(completion)
        if value is None:
            return None
        total += weights[name] * value
    return total


def scored(completion: Completion, score: Score) -> float | None:
    """Return a scoring rule as a reward, of the first confidence about the first answer; None without either."""
    if not completion.verdicts or completion.confidence is None:
        return None
    return float(score(torch.tensor(completion.confidence), torch.tensor(float(completion.correct))))
