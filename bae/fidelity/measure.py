"""Sample groups, and sample their later blocks again and again from each completion's own prefix (paper, Fig. 1).

The table has one row for each completion and each objective that conditions on an outcome:

| column | meaning |
|---|---|
| objective, prompt | names |
| group, sample | number of the prompt, and of the completion in its group |
| reward | of the completion, in this objective |
| outcome, correct | of its prefix |
| rescored_wrong, rescored_right | what its number would have earned under either outcome, NaN without a scoring rule |
| expected | what the policy's distribution over the number promised; NaN if it says nothing |
| rollouts | rewards of fresh samples of the block from the same prefix: the Monte-Carlo reference |
| nested | more of them, for the baseline that samples itself |

bae.fidelity.compare tells how near every baseline comes to what the rollouts say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import pandas
import torch
from torch import Tensor

from bae.batch import Problem, SampledTokens, Scored, group_index
from bae.fidelity.continuations import Continuations, resample
from bae.fidelity.gradients import RefinementPair, sketch_completions, sketch_reference
from bae.method.baselines import Baseline, RewardView
from bae.method.stated_numbers import Candidates
from bae.objectives import Objective
from bae.objectives.outcomes import Outcome
from bae.objectives.refining import Ranks, RefiningBaseline
from bae.objectives.reward_view import ScoreTable, number_decisions, reward_view, score_table
from bae.rollout.pipeline import Pipeline
from bae.seeds import Key
from bae.training.forward import expected_reward


class _Groups(NamedTuple):
    """Hold the groups of P problems: N = P * G completions, their seeds, scores and what baselines need of these."""

    problems: Sequence[Problem]
    keys: Sequence[Key]
    samples: SampledTokens
    scored: Scored
    table: ScoreTable


@dataclass(frozen=True)
class Study:
    """Sample what baselines are compared with; everything here holds for the whole study.

    Attributes:
        pipeline: the policy, and the objectives.
        outcome: of a prefix; what baselines may condition on.
        group_size: G, completions of each problem.
        rollouts: M, fresh samples of a later block from each prefix.
        nested: more fresh samples, for a baseline that samples itself.
        micro_batch_tokens: tokens of a forward pass.
        sketch: numbers to which gradients are sketched; 0 for no gradients.
        refining: the refining baselines whose gradients are sketched, by name.
    """

    pipeline: Pipeline
    outcome: Outcome
    group_size: int
    rollouts: int
    nested: int
    micro_batch_tokens: int
    sketch: int = 0
    refining: Mapping[str, RefiningBaseline] = field(default_factory=dict)

    def measure(self, problems: Sequence[Problem], keys: Sequence[Key]) -> tuple[pandas.DataFrame, dict[str, Tensor]]:
        """Sample a group of each problem, and `rollouts` + `nested` more of every later block from each prefix.

        Args:
            problems: P problems.
            keys: a seed for each problem; its last number is the `group` in the table.

        Returns:
            The table, and sketches of gradients by "<objective>/<name>": those of bae.fidelity.gradients, of the
            objective's rows and of the problems. Without `sketch` there are none.
        """
        samples, scored, _ = self.pipeline(problems, keys, self.group_size)
        scorer, group = self.pipeline.scorer, group_index(len(scored.completions), self.group_size)
        table = score_table(scored, scorer.objectives, self.outcome, group)
        groups = _Groups(problems, keys, samples, scored, table)
        tables: list[pandas.DataFrame] = []
        sketches: dict[str, Tensor] = {}
        later = [j for j, objective in enumerate(scorer.objectives) if objective.givens]
        for block in sorted({scorer.block_of_objective[j] for j in later}):
            again = self._sample_again(groups, block)
            for j in (j for j in later if scorer.block_of_objective[j] == block):
                tables.append(self._table(groups, again, j))
                if self.sketch:
                    name = scorer.objectives[j].name
                    sketches |= {f"{name}/{key}": found for key, found in self._sketches(groups, again, j).items()}
        return pandas.concat(tables, ignore_index=True), sketches

    def _sample_again(self, groups: _Groups, block: int) -> Continuations:
        """Sample the block again from the prefix of every completion."""
        count = len(groups.scored.completions)
        owners = [problem for problem in groups.problems for _ in range(self.group_size)]
        # From 1 on: a seed that ends in 0 is that of its group, to which numpy appends zeros.
        keys = [(*groups.keys[n // self.group_size], 1 + n % self.group_size) for n in range(count)]
        block_of = groups.scored.block_of
        return resample(self.pipeline, owners, groups.samples, block_of, block, self.rollouts + self.nested, keys)

    def _table(self, groups: _Groups, again: Continuations, j: int) -> pandas.DataFrame:
        """Return the rows of objective j."""
        view = self._view(groups, j)
        assert view.correct is not None and view.expected is not None
        keep = groups.scored.present[again.rows, j]
        rows, drawn = again.rows[keep], fill_absent(again.rewards(j)[keep])
        rescored = torch.full((len(view.reward), 2), torch.nan) if view.rescored is None else view.rescored
        return pandas.DataFrame(
            {
                "objective": self.pipeline.scorer.objectives[j].name,
                "prompt": [groups.problems[p].id for p in (rows // self.group_size).tolist()],
                "group": [groups.keys[p][-1] for p in (rows // self.group_size).tolist()],
                "sample": (rows % self.group_size).numpy(),
                "reward": view.reward[rows].numpy(),
                "outcome": view.outcome[rows].numpy(),
                "correct": view.correct[rows].numpy(),
                "rescored_wrong": rescored[rows, 0].numpy(),
                "rescored_right": rescored[rows, 1].numpy(),
                "expected": view.expected[rows].numpy(),
                "rollouts": list(drawn[:, : self.rollouts].numpy()),
                "nested": list(drawn[:, self.rollouts :].numpy()),
            }
        )

    def _view(self, groups: _Groups, j: int) -> RewardView:
        """Return what a baseline sees of objective j, with the reward that the policy's own distribution promises."""
        objective = self.pipeline.scorer.objectives[j]
        group = group_index(len(groups.scored.completions), self.group_size)
        return reward_view(objective, j, groups.table, group, expected=self._expected(groups, j))

    def _expected(self, groups: _Groups, j: int) -> Tensor:
        """Return (N,): the reward that the policy's own distribution promises, NaN where it is not known."""
        return promised(self.pipeline, groups.samples, groups.scored, j, self._candidates, self.micro_batch_tokens)

    @cached_property
    def _candidates(self) -> Candidates:
        return Candidates(self.pipeline.scorer.vocabulary, self.pipeline.scorer.closing)

    def _sketches(self, groups: _Groups, again: Continuations, j: int) -> dict[str, Tensor]:
        """Return the sketches of bae.fidelity.gradients for the rows of objective j."""
        scored, block = groups.scored, self.pipeline.scorer.block_of_objective[j]
        rows, in_block = again.rows[scored.present[again.rows, j]], scored.block_of == block
        found = sketch_completions(
            self.pipeline, groups.samples, in_block, rows, self._refinements(scored, j), self.sketch
        )
        group, count = again.rows // self.group_size, len(groups.problems)
        found["half_a"], found["half_b"] = sketch_reference(
            self.pipeline, again, block, j, group, count, self.sketch, self.micro_batch_tokens
        )
        return found

    def _refinements(self, scored: Scored, j: int) -> dict[str, RefinementPair]:
        """Return what each refining baseline makes of advantages 0 and 1."""
        zero, scorer = torch.zeros_like(scored.rewards[:, j]), self.pipeline.scorer
        return {
            name: (
                baseline.refine(j, zero, scored, scorer, Ranks()),
                baseline.refine(j, zero + 1, scored, scorer, Ranks()),
            )
            for name, baseline in self.refining.items()
        }


def promised(
    pipeline: Pipeline,
    samples: SampledTokens,
    scored: Scored,
    j: int,
    candidates: Candidates,
    micro_batch_tokens: int,
    ranks: Ranks | None = None,
) -> Tensor:
    """Return (N,): the reward of objective j that the policy's own distribution promises, NaN where it is not known.

    Args:
        pipeline: the policy and the objectives.
        samples, scored: N completions.
        j: the number of the objective. Without a score of a stated number nothing is known.
        candidates: the tokens by which a stated number can go on or end.
        micro_batch_tokens: tokens of a forward pass.
        ranks: all ranks, if the completions are shared out among them. All call this together.
    """
    if pipeline.scorer.objectives[j].score is None:
        return torch.full((len(scored.completions),), torch.nan)
    decisions = number_decisions(scored, pipeline.scorer, j, candidates, ranks)
    return expected_reward(pipeline.policy.model, samples, decisions, pipeline.temperature, micro_batch_tokens)


def fill_absent(rewards: Tensor) -> Tensor:
    """Give samples that do not count the mean of their prefix's others; (R, M), NaN for samples that do not count.

    These are malformed ones under `malformed: mask`.
    """
    return torch.where(rewards.isnan(), rewards.nanmean(1, keepdim=True).nan_to_num(), rewards)


def check_conditioned(objectives: Sequence[Objective]) -> None:
    """Refuse objectives of which none is conditioned on what came before its block. Raises ValueError."""
    if not any(objective.givens for objective in objectives):
        raise ValueError(
            "fidelity: none of the objectives is conditioned on an outcome (`given`), so there is no later block to "
            "sample again"
        )


def check_nested(baselines: Mapping[str, Baseline], nested: int) -> None:
    """Refuse a baseline that samples, such as monte_carlo, if it needs more samples than there will be.

    Such a baseline has a whole number `rollouts`.

    Args:
        baselines: by name.
        nested: fresh samples for such baselines.

    Raises:
        ValueError: if one needs more.
    """
    for name, baseline in baselines.items():
        rollouts = getattr(baseline, "rollouts", 0)
        if isinstance(rollouts, int) and rollouts > nested:
            raise ValueError(
                f"nested={nested}: baseline {name} needs {rollouts} of its own; raise nested or leave it out"
            )
