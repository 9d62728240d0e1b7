"""Objectives: what a block of a completion is rewarded for. One small file for each reward function or scoring rule.

A reward function is any callable (Completion, …) -> float | None, None meaning "nothing here to score". A scoring rule
is any callable (q, c, …) on tensors, the reward of stating the confidence q where an answer is right (c = 1) or
not (c = 0): what it would have been under the other outcome, or for another number, is then known too, and baselines
can use that. Yaml names either by `_target_`, so a user's own needs no change here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from bae.batch import Completion
from bae.text.blocks import Block, tags_named


@dataclass(frozen=True)
class Objective:
    """One column of the reward matrix.

    name: as it appears in metrics. block: the block whose tokens it moves.
    worst: the lowest reward there is; what `malformed: penalise` gives.
    reward: the reward function; or else
    score: the scoring rule of a stated number.
    number, answer: which `confidence` section states it, and which `answer` it is about; both count from 0, for formats
        that have several.
    weight: factor of its advantage, where several objectives share a block.
    given: the objective of an earlier block whose reward is the outcome that a conditioned baseline conditions on, or
        several; None for the first block.
    """

    name: str
    block: str
    worst: float
    reward: Callable[[Completion], float | None] | None = None
    score: Callable[[Tensor, Tensor], Tensor] | None = None
    weight: float = 1.0
    given: str | Sequence[str] | None = None
    number: int = 0
    answer: int = 0

    @property
    def givens(self) -> tuple[str, ...]:
        """The objectives whose outcomes a conditioned baseline conditions on; none for the first block."""
        return () if self.given is None else (self.given,) if isinstance(self.given, str) else tuple(self.given)


def check_objectives(objectives: Sequence[Objective], blocks: Sequence[Block]) -> None:
    """Raises ValueError, one sentence, if an objective names a block or an outcome that is not there, or comes too
    late for it."""
    order = {block.name: k for k, block in enumerate(blocks)}
    by_name = {objective.name: objective for objective in objectives}
    if not objectives:
        raise ValueError("objectives.objectives is empty; name at least one")
    for objective in objectives:
        where = f"objectives.objectives.{objective.name}"
        if (objective.reward is None) == (objective.score is None):
            raise ValueError(
                f"{where}: give it a reward (of a completion) or a score (of a stated number), one of the two"
            )
        if objective.block not in order:
            raise ValueError(f"{where}.block={objective.block}: no such block; there are {', '.join(order)}")
        if objective.score is not None:
            for key, tag in (("number", "confidence"), ("answer", "answer")):
                which, count = getattr(objective, key), len(tags_named(blocks, tag))
                if not 0 <= which < count:
                    raise ValueError(f"{where}.{key}={which}: the blocks have {count} sections {tag!r}, counted from 0")
        for given in objective.givens:
            if given not in by_name:
                raise ValueError(f"{where}.given={given}: no such objective; there are {', '.join(by_name)}")
            if order[by_name[given].block] >= order[objective.block]:
                raise ValueError(
                    f"{where}.given={given}: it must belong to a block before {objective.block}, or the baseline "
                    "would depend on the very tokens it judges"
                )
