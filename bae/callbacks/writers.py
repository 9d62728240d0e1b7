"""The two callbacks that write on the batch before the training step reads it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bae import seeds
from bae.batch import Advantages, Refinement, RolloutBatch, group_index
from bae.callbacks.collectives import gather, gather_objects
from bae.fidelity.continuations import resample
from bae.method import normalisation as normalisations
from bae.method.advantages import advantages, sum_by_block
from bae.method.baselines import (
    Baseline,
    has_signal_alone,
    load_state,
    outcome_strata,
    state_of,
    strata_of,
    stratum_size,
    with_fallback,
)
from bae.method.normalisation import Normalisation
from bae.objectives.outcomes import Outcome
from bae.objectives.refining import Ranks, RefiningBaseline
from bae.objectives.reward_view import ScoreTable, reward_view, score_table
from bae.rollout.pipeline import Pipeline


class Rollouts(L.Callback):
    """Write `samples` and `scored`: completions of the step's problems by the policy as it is.

    Args:
        pipeline: encodes, samples and scores.
        seed: of the draws.
    """

    def __init__(self, pipeline: Pipeline, seed: int) -> None:
        self.pipeline = pipeline
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        count = len(batch.problems)
        keys = seeds.keys(self.seed, batch.step, trainer.global_rank * count, count)
        batch.samples, batch.scored, seconds = self.pipeline(batch.problems, keys, batch.group_size)
        batch.seconds.update(seconds)


class BlockwiseAdvantages(L.Callback):
    """Write `advantages`: reward minus baseline, objective by objective (paper, section 3).

    They are all NaN if a reward of the batch, over all ranks, is infinite. The update then skips the step.

    Args:
        pipeline: its scorer has the objectives; it samples for a baseline that samples.
        baseline: for objectives of later blocks, which are conditioned on an outcome (`given`).
        first_block_baseline: for the other objectives.
        fallback_baseline: for completions where either has none.
        outcome: of a prefix; what the baseline of later blocks may condition on.
        normalisation: what the advantages of each `objective`, and each `block`'s weighted sum of them, are divided by.
        group_size, optimizer_steps: of the run, to refuse baselines that cannot work with them.
        seed: of the draws of a baseline that samples.

    Raises:
        ValueError: for a baseline that cannot work with the objectives or with these settings.
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
        group_size: int = 2,
        optimizer_steps: int = 1,
    ) -> None:
        self.pipeline = pipeline
        self.scorer = pipeline.scorer
        self.baseline = baseline
        self.first_block_baseline = first_block_baseline
        self.fallback_baseline = fallback_baseline
        self.outcome = outcome
        self.normalisation = normalisation
        self.seed = seed
        for function in normalisation.values():  # of an invented batch, so that wrong options are refused at once
            function(torch.zeros(2), torch.zeros(2).long(), torch.ones(2).bool(), torch.zeros(2).long())
        self._check_baselines(group_size)
        if isinstance(baseline, RefiningBaseline):
            self._check_refining(baseline, optimizer_steps)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        _, scored = batch.require_rollouts()
        rows = len(scored.rewards)
        with batch.timed("baseline"):
            # Every rank computes the whole batch: a batch mean is over all of it, and other baselines cost nothing.
            local = score_table(scored, self.scorer.objectives, self.outcome, group_index(rows, batch.group_size))
            table = ScoreTable(*(gather(trainer, column) for column in local))
            if not table.rewards.isfinite().all():
                # A mean that has an infinite reward in it is none, and a baseline that learns would never forget it.
                # So there are no advantages, on any rank, and the update skips the step.
                per_block = torch.full((rows, len(self.scorer.blocks)), torch.nan)
                batch.advantages = Advantages(torch.full_like(scored.rewards, torch.nan), per_block)
                return
            group = group_index(len(table.rewards), batch.group_size)
            baselines = self._baselines(trainer, batch, table, group)
            centred = advantages(table.rewards, baselines, table.present)
            mine = slice(trainer.global_rank * rows, (trainer.global_rank + 1) * rows)
            per_objective, per_block = (x[mine] for x in self._normalised(centred, table, group))
            batch.advantages = Advantages(
                per_objective=per_objective,
                per_block=per_block,
                refinements=self._refinements(trainer, batch, per_objective),
                weights=[objective.weight for objective in self.scorer.objectives],
                block_of_objective=self.scorer.block_of_objective,
                baselines=baselines[mine],
                outcomes=table.outcome[mine],
            )

    def _baselines(self, trainer: L.Trainer, batch: RolloutBatch, table: ScoreTable, group: Tensor) -> Tensor:
        """Return (N, J): the baseline of each reward of the whole batch; and measure where there was none."""
        baselines = torch.zeros_like(table.rewards)
        for j, objective in enumerate(self.scorer.objectives):
            view = reward_view(objective, j, table, group, partial(self._resample, trainer, batch, j))
            baseline = self.baseline if objective.givens else self.first_block_baseline
            baselines[:, j], lacking = with_fallback(baseline, self.fallback_baseline, view)
            alone = stratum_size(outcome_strata(view), view.present) == 1
            for name, flags in (("fallback", lacking), ("singleton", alone)):
                batch.metrics[f"{name}/{objective.name}"] = flags[view.present].float().mean().item()
        return baselines

    def _normalised(self, per_objective: Tensor, table: ScoreTable, group: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised advantages of the whole batch, (N, J) and (N, K)."""
        scorer = self.scorer
        for j in range(len(scorer.objectives)):
            present, stratum = table.present[:, j], strata_of(group, table.outcome[:, j])
            per_objective[:, j] = self.normalisation["objective"](per_objective[:, j], group, present, stratum)
        weights = [objective.weight for objective in scorer.objectives]
        per_block = sum_by_block(per_objective, scorer.block_of_objective, weights, len(scorer.blocks))
        for k in range(len(scorer.blocks)):
            present = table.present[:, torch.tensor(scorer.block_of_objective) == k].any(1)
            per_block[:, k] = self.normalisation["block"](per_block[:, k], group, present, group)
        return per_objective, per_block

    def _refinements(self, trainer: L.Trainer, batch: RolloutBatch, per_objective: Tensor) -> list[Refinement]:
        """Return what the training pass adds to the advantages of later blocks; and measure where it adds nothing."""
        found: list[Refinement] = []
        if not isinstance(self.baseline, RefiningBaseline):
            return found
        _, scored = batch.require_rollouts()
        ranks = Ranks(trainer.global_rank, partial(gather_objects, trainer))
        for j, objective in enumerate(self.scorer.objectives):
            if not objective.givens:
                continue
            refinement = self.baseline.refine(j, per_objective[:, j], scored, self.scorer, ranks)
            if refinement is None:
                continue
            found.append(refinement)
            unrefined, present = (gather(trainer, x) for x in (refinement.unrefined, scored.present[:, j]))
            batch.metrics[f"fallback/{objective.name}"] = unrefined[present].float().mean().item()
        return found

    def _resample(self, trainer: L.Trainer, batch: RolloutBatch, j: int, rollouts: int) -> Tensor:
        """Return (N, rollouts) over all ranks, NaN for completions that never reached the block."""
        samples, scored = batch.require_rollouts()
        problems = [completion.problem for completion in scored.completions]
        first = trainer.global_rank * len(problems)
        namespace = seeds.Namespace.REROLLOUTS
        keys = [seeds.key(self.seed, namespace, batch.step, first + n) for n in range(len(problems))]
        block = self.scorer.block_of_objective[j]
        again = resample(self.pipeline, problems, samples, scored.block_of, block, rollouts, keys)
        rewards = torch.full((len(problems), rollouts), torch.nan)
        rewards[again.rows] = again.rewards(j)
        return gather(trainer, rewards)

    def _check_baselines(self, group_size: int) -> None:
        """Ask both baselines about an invented batch, and refuse those that cannot work."""
        if isinstance(self.first_block_baseline, RefiningBaseline):
            raise ValueError(
                "first_block_baseline: a baseline that is finished in the training pass is for later blocks; choose "
                "another"
            )
        for key, baseline in (("first_block_baseline", self.first_block_baseline), ("baseline", self.baseline)):
            used = any(bool(o.givens) == (key == "baseline") for o in self.scorer.objectives)
            signal = has_signal_alone(baseline, self.fallback_baseline)  # whatever the group: it refuses wrong shapes
            if group_size == 1 and used and not signal:
                raise ValueError(
                    f"group_size=1: {key} compares a completion with its group, so every advantage would be 0; use "
                    "group_size=2 or more"
                )

    def _check_refining(self, baseline: RefiningBaseline, optimizer_steps: int) -> None:
        """Refuse what a baseline that is finished in the training pass cannot work with."""
        baseline.check(self.scorer, optimizer_steps)
        for part, function in self.normalisation.items():
            if not _is_none(function):
                raise ValueError(
                    f"normalisation.{part}: this baseline finishes its advantages in the training pass, which divides "
                    "none; choose normalisation=none"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"baseline": state_of(self.baseline), "first_block_baseline": state_of(self.first_block_baseline)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_state(self.baseline, state["baseline"])
        load_state(self.first_block_baseline, state["first_block_baseline"])


def _is_none(function: Normalisation) -> bool:
    """Tell whether a normalisation divides by nothing, however it was wrapped."""
    return (function.func if isinstance(function, partial) else function) is normalisations.none
