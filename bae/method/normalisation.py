"""Normalise advantages. Pure torch.

conf/normalisation has pairs of these functions: `objective` for the advantages of each objective, and `block` for the
weighted sum of them in each block. The paper divides by nothing. All statistics are over the whole batch of all ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bae.method.baselines import stratified_mean, stratum_size

Normalisation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Map (advantage (N,), group (N,) long, present (N,) bool) to (N,), zero where not present. group: any labels."""


def none(advantage: Tensor, group: Tensor, present: Tensor) -> Tensor:
    """Return A unchanged (paper, section 3)."""
    return torch.where(present, advantage, 0.0)


def group_std(advantage: Tensor, group: Tensor, present: Tensor, epsilon: float) -> Tensor:
    """Return A / (s + epsilon), where s² is the sum of A² over the n present members of the group, over n - 1.

    With the group mean as baseline, s is the standard deviation, as in GRPO (arXiv 2402.03300). With OCB, s is the
    spread around the means of the outcomes. The squares are around 0 and not around the mean of the group, so that a
    group is not divided by epsilon alone if the baseline does not centre it. A member that is alone in its group
    gets 0.

    Args:
        advantage: (N,).
        group: (N,) long, any labels.
        present: (N,) bool.
        epsilon: is added to s.
    """
    spread = _spread(advantage, group, present)
    return torch.where(present & (stratum_size(group, present) > 1), advantage / (spread + epsilon), 0.0)


def batch_std(advantage: Tensor, group: Tensor, present: Tensor, epsilon: float) -> Tensor:
    """Return (A - m) / (s + epsilon), where m and s are the mean and standard deviation of all present completions.

    This is the last step of GDPO (arXiv 2601.05242), and the normalisation of REINFORCE++ (arXiv 2501.03262). A
    completion that is the only one present gets 0.

    Args:
        advantage: (N,).
        group: (N,) long, not used.
        present: (N,) bool.
        epsilon: is added to s.
    """
    everyone = torch.zeros_like(group)
    centred = advantage - stratified_mean(advantage, everyone, present)
    return torch.where(present, centred / (_spread(centred, everyone, present) + epsilon), 0.0)


def _spread(values: Tensor, stratum: Tensor, present: Tensor) -> Tensor:
    """Return the root of (sum of squares / (n - 1)) over the n present members of each completion's stratum; (N,).

    If the values are centred, it is the standard deviation.
    """
    n = stratum_size(stratum, present)
    return (stratified_mean(values**2, stratum, present) * n / (n - 1).clamp(min=1)).sqrt()
