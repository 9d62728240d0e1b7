"""Baselines that are finished in the training pass, because they need the policy's own distribution."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from bae.batch import Refinement, Scored
from bae.method.baselines import Baseline
from bae.objectives.scoring import Scorer


def _alone(value: Any) -> list[Any]:
    return [value]


class Ranks(NamedTuple):
    """Hold which rank this is, and how objects are gathered: a value of this rank -> those of all ranks, in order."""

    rank: int = 0
    gather: Callable[[Any], Sequence[Any]] = _alone


@runtime_checkable
class RefiningBaseline(Baseline, Protocol):
    """Give a baseline before the training pass, and what the training pass adds to it.

    `__call__` gives the baseline that holds where the refinement changes nothing. If `RewardView.expected` is given,
    as in fidelity studies, it gives the refined baseline of the whole block.
    """

    def check(self, scorer: Scorer, optimizer_steps: int = 1) -> None:
        """Refuse objectives and numbers of optimiser steps that it cannot work with. Raises ValueError."""
        ...

    def refine(self, j: int, advantage: Tensor, scored: Scored, scorer: Scorer, ranks: Ranks) -> Refinement | None:
        """Return what the training pass adds for one objective, None if there is nothing to add.

        Args:
            j: the number of an objective that conditions on an outcome.
            advantage: (N,), its advantages, of this rank.
            scored: the completions of this rank.
            scorer: their format and objectives.
            ranks: all ranks call this together.
        """
        ...
