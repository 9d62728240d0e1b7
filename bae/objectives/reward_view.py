"""From scored completions to what a baseline sees of them: tensors that can be gathered over ranks."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bae.batch import Scored
from bae.method.baselines import RewardView
from bae.method.stated_numbers import Candidates, Decisions, find_decisions
from bae.objectives import Objective
from bae.objectives.outcomes import Outcome
from bae.objectives.refining import Ranks
from bae.objectives.scoring import Scorer
from bae.objectives.values import correct_flags, stated_confidences

OUTCOMES = 1e6
"""The factor between one outcome of a prefix and the next, where there are several. It is above any outcome that
bae.objectives.outcomes makes."""


class ScoreTable(NamedTuple):
    """Hold what baselines need of N completions, group by group; (N, J) each.

    Attributes:
        rewards, present, malformed: as in Scored.
        confidence: the number that an objective scores, NaN where there is none.
        correct: 0 or 1, whether the answer that it is about is right.
        outcome: the outcome of the prefix, 0 for objectives that condition on none.
    """

    rewards: Tensor
    present: Tensor
    malformed: Tensor
    confidence: Tensor
    correct: Tensor
    outcome: Tensor


def score_table(scored: Scored, objectives: Sequence[Objective], outcome: Outcome, group: Tensor) -> ScoreTable:
    """Make the table of some completions; group: (N,) long, the prompt of each. Groups must be whole.

    Raises ValueError for an outcome that does not give one number for each completion.
    """
    names = [objective.name for objective in objectives]
    outcomes = torch.zeros_like(scored.rewards, dtype=torch.double)
    for j, objective in enumerate(objectives):
        for given in objective.givens:
            fresh = outcome(scored.completions, scored.rewards[:, names.index(given)], group)
            if fresh.shape != group.shape:
                raise ValueError(
                    f"outcome: it gave {tuple(fresh.shape)} for {len(group)} completions; it must give (N,)"
                )
            outcomes[:, j] = OUTCOMES * outcomes[:, j] + fresh
    confidence = torch.stack([stated_confidences(scored.completions, o.number) for o in objectives], 1)
    correct = torch.stack([correct_flags(scored.completions, o.answer) for o in objectives], 1)
    return ScoreTable(scored.rewards, scored.present, scored.malformed, confidence, correct, outcomes)


def reward_view(
    objective: Objective,
    j: int,
    table: ScoreTable,
    group: Tensor,
    resample: Callable[[int], Tensor] | None = None,
    expected: Tensor | None = None,
) -> RewardView:
    """Return what the baseline of objective j sees; `resample` and `expected` as in RewardView."""
    reward = table.rewards[:, j]
    return RewardView(
        reward=reward,
        group=group,
        outcome=table.outcome[:, j],
        present=table.present[:, j],
        correct=table.correct[:, j].long(),
        rescored=None if objective.score is None else _rescored(objective, j, table),
        resample=resample,
        expected=expected,
    )


def _rescored(objective: Objective, j: int, table: ScoreTable) -> Tensor:
    """Return (N, 2): what each completion would have earned if its answer had been wrong, and right."""
    assert objective.score is not None
    outcomes = torch.tensor([0.0, 1.0]).expand(len(table.rewards), 2)
    rescored = objective.score(table.confidence[:, j : j + 1], outcomes)
    # Malformed output earns the same, whatever the outcome.
    fixed = table.malformed[:, j] | rescored[:, 0].isnan()
    return torch.where(fixed.unsqueeze(1), table.rewards[:, j].unsqueeze(1), rescored)


def number_decisions(
    scored: Scored, scorer: Scorer, j: int, candidates: Candidates, ranks: Ranks | None = None
) -> Decisions:
    """Find where the numbers that objective j scores were decided, and what each alternative would have earned.

    All ranks call this together, because values depend on the numbers of the whole batch.
    """
    ranks = ranks or Ranks()
    objective, present = scorer.objectives[j], scored.present[:, j].tolist()
    assert objective.score is not None
    stated = [row[objective.number] if objective.number < len(row) else None for row in scored.numbers]
    numbers = [number if counts else None for number, counts in zip(stated, present, strict=True)]
    reports = ranks.gather([(number.content, number.value) for number in numbers if number])
    return find_decisions(
        numbers,
        correct_flags(scored.completions, objective.answer),
        objective.score,
        scorer.malformed_reward(j),
        candidates,
        reports=[report for part in reports for report in part],
        own=sum(map(len, reports[: ranks.rank])),
    )
