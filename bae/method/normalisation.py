"""What an advantage is divided by. Pure torch.

conf/normalisation has pairs of these: `objective` for the advantages of each objective, `block` for each block's
weighted sum of them. The paper divides by nothing. All statistics are of the whole batch, all ranks together.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bae.method.baselines import stratified_mean, stratum_size

Normalisation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(advantage (N,), group (N,) long, present (N,) bool) -> (N,), zero where not present. group: any labels."""


def none(advantage: Tensor, group: Tensor, present: Tensor) -> Tensor:
    """A (paper, section 3)."""
    return torch.where(present, advantage, 0.0)


def group_std(advantage: Tensor, group: Tensor, present: Tensor, epsilon: float) -> Tensor:
    """A / (s + epsilon), s^2 the sum of the squares of the group's n present members over n - 1; 0 where one is alone.

    With the group mean as baseline s is the standard deviation, as in GRPO (arXiv 2402.03300); with OCB, the spread
    around the outcomes' means. Around 0, not around the group's mean, so that a baseline that does not centre a group
    has no group divided by epsilon alone.
    """
    spread = _spread(advantage, group, present)
    return torch.where(present & (stratum_size(group, present) > 1), advantage / (spread + epsilon), 0.0)


def batch_std(advantage: Tensor, group: Tensor, present: Tensor, epsilon: float) -> Tensor:
    """(A - m) / (s + epsilon), m and s the mean and standard deviation of all that are present; 0 if that is one.

    The last step of GDPO (arXiv 2601.05242); REINFORCE++'s (arXiv 2501.03262).
    """
    everyone = torch.zeros_like(group)
    centred = advantage - stratified_mean(advantage, everyone, present)
    return torch.where(present, centred / (_spread(centred, everyone, present) + epsilon), 0.0)


def _spread(values: Tensor, stratum: Tensor, present: Tensor) -> Tensor:
    """(N,): root of the sum of squares over n - 1, of the n present members of each one's stratum; the standard
    deviation if they are centred."""
    n = stratum_size(stratum, present)
    return (stratified_mean(values**2, stratum, present) * n / (n - 1).clamp(min=1)).sqrt()
