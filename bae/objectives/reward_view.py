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
from bae.objectives.scoring import Scorer, correct_flags, stated_confidences

APART = 1e6
"""Of several outcomes of a prefix, the factor between one and the next; above any that bae.objectives.outcomes
makes."""


class ScoreTable(NamedTuple):
    """Of N completions, group by group; (N, J) each. rewards, present, malformed: as in Scored. confidence: the number
    that an objective scores, NaN where there is none. correct: 0 or 1, whether the answer that it is about is right.
    outcome: of the prefix, 0 for objectives that condition on none."""

    rewards: Tensor
    present: Tensor
    malformed: Tensor
    confidence: Tensor
    correct: Tensor
    outcome: Tensor


def score_table(scored: Scored, objectives: Sequence[Objective], outcome: Outcome, group: Tensor) -> ScoreTable:
    """group: (N,) long, the prompt of each completion; groups are whole."""
    names = [objective.name for objective in objectives]
    columns = lambda each: torch.stack(list(each), 1)  # noqa: E731
    outcomes = torch.zeros_like(scored.rewards, dtype=torch.double)
    for j, objective in enumerate(objectives):
        for given in objective.givens:
            fresh = outcome(scored.completions, scored.rewards[:, names.index(given)], group)
            outcomes[:, j] = APART * outcomes[:, j] + fresh
    confidence = columns(stated_confidences(scored.completions, o.number) for o in objectives)
    correct = columns(correct_flags(scored.completions, o.answer) for o in objectives)
    return ScoreTable(scored.rewards, scored.present, scored.malformed, confidence, correct, outcomes)


def reward_view(
    objective: Objective,
    j: int,
    table: ScoreTable,
    group: Tensor,
    resample: Callable[[int], Tensor] | None = None,
    expected: Tensor | None = None,
) -> RewardView:
    """What the baseline of objective j sees; `resample` and `expected` as in RewardView."""
    reward = table.rewards[:, j]
    rescored = None
    if objective.score is not None:
        outcomes = torch.tensor([0.0, 1.0])
        rescored = objective.score(table.confidence[:, j : j + 1], outcomes.expand(len(reward), 2))
        # Malformed output earns what it earns, whatever the outcome.
        rescored = torch.where(
            (table.malformed[:, j] | rescored[:, 0].isnan()).unsqueeze(1), reward.unsqueeze(1), rescored
        )
    return RewardView(
        reward,
        group,
        table.outcome[:, j],
        table.present[:, j],
        table.correct[:, j].long(),
        rescored,
        resample,
        expected,
    )


def number_decisions(
    scored: Scored,
    scorer: Scorer,
    j: int,
    candidates: Candidates,
    gather: Callable[[list], list[list]] = lambda mine: [mine],
    rank: int = 0,
) -> Decisions:
    """Where the numbers that objective j scores were decided, and what each alternative would have earned.

    gather: a list of this rank -> those of all ranks, in order.
    """
    objective, present = scorer.objectives[j], scored.present[:, j].tolist()
    assert objective.score is not None
    stated = [row[objective.number] if objective.number < len(row) else None for row in scored.numbers]
    numbers = [number if counts else None for number, counts in zip(stated, present, strict=True)]
    reports = gather([(number.content, number.value) for number in numbers if number])
    own = sum(map(len, reports[:rank]))
    correct = correct_flags(scored.completions, objective.answer)
    return find_decisions(numbers, correct, objective.score, scorer.malformed_reward(j), candidates,
                          [report for part in reports for report in part], own)  # fmt: skip
