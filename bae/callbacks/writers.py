"""The two callbacks that write on the batch before the training step reads it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bae.batch import Advantages, NumberAdvantages, RolloutBatch, group_index
from bae.callbacks.collectives import gather, gather_objects
from bae.fidelity.continuations import resample
from bae.method.advantages import advantages, sum_by_block
from bae.method.baselines import (
    Baseline,
    RaoBlackwell,
    load_state,
    outcome_strata,
    state_of,
    stratum_size,
    with_fallback,
)
from bae.method.normalisation import Normalisation
from bae.method.stated_numbers import Candidates
from bae.objectives.outcomes import Outcome
from bae.objectives.reward_view import ScoreTable, number_decisions, reward_view, score_table
from bae.objectives.scoring import Scorer
from bae.rollout.pipeline import Pipeline
from bae.text.blocks import CONFIDENCE, tags_named

REROLLOUTS = 2**32 - 3
"""In the seeds of fresh samples from a prefix; no training step has this number."""


class Rollouts(L.Callback):
    """Writes `samples` and `scored`: completions of the step's problems by the policy as it is."""

    def __init__(self, pipeline: Pipeline, seed: int):
        self.pipeline = pipeline
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        first = trainer.global_rank * len(batch.problems)
        keys = [(self.seed, batch.step, first + p) for p in range(len(batch.problems))]
        batch.samples, batch.scored, seconds = self.pipeline(batch.problems, keys, batch.group_size)
        batch.seconds.update(seconds)


class BlockwiseAdvantages(L.Callback):
    """Writes `advantages`: reward minus baseline, objective by objective (paper, section 3).

    baseline: for objectives of later blocks, those that are conditioned on an outcome (`given`).
    first_block_baseline: for the others.
    fallback_baseline: for completions where either has none.
    outcome: of a prefix; what the baseline of later blocks may condition on.
    normalisation: what each `objective`'s advantages, and each `block`'s weighted sum of them, are divided by.
    seed: of the draws of a baseline that samples.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        baseline: Baseline,
        first_block_baseline: Baseline,
        fallback_baseline: Baseline,
        outcome: Outcome,
        normalisation: Mapping[str, Normalisation],
        seed: int,
    ):
        self.pipeline = pipeline
        self.scorer = pipeline.scorer
        self.normalisation = normalisation
        self.baseline = baseline
        self.first_block_baseline = first_block_baseline
        self.fallback_baseline = fallback_baseline
        self.outcome = outcome
        self.seed = seed
        self.candidates = None
        if isinstance(baseline, RaoBlackwell):
            check_rao_blackwell(self.scorer)
            self.candidates = Candidates(self.scorer.vocabulary, self.scorer.closing)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        _, scored = batch.require_rollouts()
        objectives, rows = self.scorer.objectives, len(scored.rewards)
        with batch.timed("baseline"):
            # Every rank weighs the whole batch: a batch mean is over all of it, and other baselines cost nothing.
            local = score_table(scored, objectives, self.outcome, group_index(rows, batch.group_size))
            table = ScoreTable(*(gather(trainer, column) for column in local))
            group = group_index(len(table.rewards), batch.group_size)
            baselines = torch.zeros_like(table.rewards)
            for j, objective in enumerate(objectives):
                resample = partial(self._resample, trainer, batch, j)
                rewards = reward_view(objective, j, table, group, resample)
                baseline = self.baseline if objective.givens else self.first_block_baseline
                baselines[:, j], lacking = with_fallback(baseline, self.fallback_baseline, rewards)
                alone = stratum_size(outcome_strata(rewards), rewards.present) == 1
                for name, flags in (("fallback", lacking), ("singleton", alone)):
                    batch.metrics[f"{name}/{objective.name}"] = flags[rewards.present].float().mean().item()
            per_objective, per_block = self._normalised(
                advantages(table.rewards, baselines, table.present), table, group
            )
            mine = slice(trainer.global_rank * rows, (trainer.global_rank + 1) * rows)
            per_objective, per_block = per_objective[mine], per_block[mine]
            numbers = self._numbers(trainer, batch, per_objective) if self.candidates else []
            batch.advantages = Advantages(per_objective, per_block, numbers)

    def _normalised(self, per_objective: Tensor, table: ScoreTable, group: Tensor) -> tuple[Tensor, Tensor]:
        """(N, J) and (N, K), of the whole batch."""
        scorer = self.scorer
        for j in range(len(scorer.objectives)):
            per_objective[:, j] = self.normalisation["objective"](per_objective[:, j], group, table.present[:, j])
        weights = [objective.weight for objective in scorer.objectives]
        per_block = sum_by_block(per_objective, scorer.block_of_objective, weights, len(scorer.blocks))
        for k in range(len(scorer.blocks)):
            present = table.present[:, torch.tensor(scorer.block_of_objective) == k].any(1)
            per_block[:, k] = self.normalisation["block"](per_block[:, k], group, present)
        return per_objective, per_block

    def _resample(self, trainer: L.Trainer, batch: RolloutBatch, j: int, rollouts: int) -> Tensor:
        """(N, rollouts) over all ranks, NaN for completions that never reached the block."""
        samples, scored = batch.require_rollouts()
        problems = [completion.problem for completion in scored.completions]
        first = trainer.global_rank * len(problems)
        keys = [(self.seed, REROLLOUTS, batch.step, first + n) for n in range(len(problems))]
        again = resample(
            self.pipeline, problems, samples, scored.block_of, self.scorer.block_of_objective[j], rollouts, keys
        )
        rewards = torch.full((len(problems), rollouts), torch.nan)
        rewards[again.rows] = again.rewards(j)
        return gather(trainer, rewards)

    def _numbers(self, trainer: L.Trainer, batch: RolloutBatch, per_objective: Tensor) -> list[NumberAdvantages]:
        """For each objective of a stated number: what it might have said, and what that would have earned."""
        assert self.candidates is not None and isinstance(self.baseline, RaoBlackwell)
        _, scored = batch.require_rollouts()
        found = []
        for j, objective in enumerate(self.scorer.objectives):
            if not objective.givens or objective.score is None:
                continue
            everyone = partial(gather_objects, trainer)
            decisions = number_decisions(scored, self.scorer, j, self.candidates, everyone, trainer.global_rank)
            block, all_action = self.scorer.block_of_objective[j], self.baseline.all_action
            reward, advantage = scored.rewards[:, j], per_objective[:, j]
            found.append(NumberAdvantages(decisions, reward, advantage, block, objective.weight, all_action))
            decided = (decisions.position >= 0).any(1)
            undecided, present = (gather(trainer, x) for x in (~decided, scored.present[:, j]))
            batch.metrics[f"fallback/{objective.name}"] = undecided[present].float().mean().item()
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"baseline": state_of(self.baseline), "first_block_baseline": state_of(self.first_block_baseline)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_state(self.baseline, state["baseline"])
        load_state(self.first_block_baseline, state["first_block_baseline"])


def check_rao_blackwell(scorer: Scorer) -> None:
    """Raises ValueError if there is an objective whose reward cannot be expected over the number that is stated."""
    closings = {tags.closing for tags in tags_named(scorer.blocks, CONFIDENCE)}
    if len(closings) > 1:
        raise ValueError(
            f"baseline=rao_blackwell: the {CONFIDENCE} sections close with {' and '.join(sorted(closings))}; "
            "let them close alike"
        )
    for objective, malformed in zip(scorer.objectives, scorer.malformed, strict=True):
        if objective.givens and objective.score is None:
            raise ValueError(
                f"baseline=rao_blackwell: objectives.rewards.{objective.name} has no score of a stated number to "
                "take the expectation of; choose another baseline"
            )
        if objective.givens and malformed == "mask":
            raise ValueError(
                f"baseline=rao_blackwell: under malformed=mask a spoilt number has no reward to expect, and "
                f"objectives.rewards.{objective.name} has that policy; choose penalise or zero"
            )
