"""Normalise advantages. Pure torch.

conf/normalisation has pairs of these functions: `objective` for the advantages of each objective, and `block` for the
weighted sum of them in each block. The paper divides by nothing. All statistics are over the whole batch of all ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bae.method.baselines import stratified_mean, stratum_size

Normalisation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Map (advantage (N,), group (N,) long, present (N,) bool, stratum (N,) long) to (N,), zero where not present.

group, stratum: any labels, of the prompt, and of the prompt and the outcome of the prefix together. For `block` and for
objectives that condition on nothing, the stratum is the group.
"""


def none(advantage: Tensor, group: Tensor, present: Tensor, stratum: Tensor) -> Tensor:
    """Return A unchanged (paper, section 3)."""
    return torch.where(present, advantage, 0.0)


def group_std(advantage: Tensor, group: Tensor, present: Tensor, stratum: Tensor, epsilon: float) -> Tensor:
    """Return A / (s + epsilon), where s² is the sum of A² over the n present members of the group, over n - 1.

    With the group mean as baseline, s is the standard deviation, as in GRPO (arXiv 2402.03300). With OCB, s is the
    spread around the means of the outcomes. The squares are around 0 and not around the mean of the group, so that a
    group is not divided by epsilon alone if the baseline does not centre it. A member that is alone in its group
    gets 0.

    Args:
        advantage: (N,).
        group: (N,) long, any labels.
        present: (N,) bool.
        stratum: (N,) long, not used.
        epsilon: is added to s.
    """
    spread = _spread(advantage, group, present)
    return torch.where(present & (stratum_size(group, present) > 1), advantage / (spread + epsilon), 0.0)


def batch_std(advantage: Tensor, group: Tensor, present: Tensor, stratum: Tensor, epsilon: float) -> Tensor:
    """Return (A - m) / (s + epsilon), where m and s are the mean and standard deviation of all present completions.

    This is the last step of GDPO (arXiv 2601.05242), and the normalisation of REINFORCE++ (arXiv 2501.03262). A
    completion that is the only one present gets 0.

    Args:
        advantage: (N,).
        group: (N,) long, not used.
        present: (N,) bool.
        stratum: (N,) long, not used.
        epsilon: is added to s.
    """
    return _standardised(advantage, torch.zeros_like(group), present, epsilon)


def stratum_std(
    advantage: Tensor, group: Tensor, present: Tensor, stratum: Tensor, blend: float, epsilon: float
) -> Tensor:
    """Return blend * S + (1 - blend) * G, the advantages of Stratified GRPO (arXiv 2510.06214).

    S is (A - m) / (s + epsilon) with the mean m and the standard deviation s of the stratum, and G the same of the
    group. So the baseline does not matter as long as it is constant in a stratum, or, for G, in a group. A completion
    that is alone in its stratum has S = 0.

    Args:
        advantage: (N,).
        group, stratum: (N,) long, any labels.
        present: (N,) bool.
        blend: the weight of S, in [0, 1].
        epsilon: is added to s.

    Raises:
        ValueError: if blend is outside [0, 1].
    """
    if not 0 <= blend <= 1:
        raise ValueError(f"normalisation.objective.blend={blend}: must be between 0 and 1")
    within, over = (_standardised(advantage, labels, present, epsilon) for labels in (stratum, group))
    return blend * within + (1 - blend) * over


def _standardised(advantage: Tensor, labels: Tensor, present: Tensor, epsilon: float) -> Tensor:
    """Return (A - m) / (s + epsilon), with the mean and the standard deviation of those with the same label; (N,)."""
    centred = advantage - stratified_mean(advantage, labels, present)
    return torch.where(present, centred / (_spread(centred, labels, present) + epsilon), 0.0)


def _spread(values: Tensor, stratum: Tensor, present: Tensor) -> Tensor:
    """Return the root of (sum of squares / (n - 1)) over the n present members of each completion's stratum; (N,).

    If the values are centred, it is the standard deviation.
    """
    n = stratum_size(stratum, present)
    return (stratified_mean(values**2, stratum, present) * n / (n - 1).clamp(min=1)).sqrt()
