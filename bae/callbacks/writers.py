"""The two callbacks that write on the batch before the training step reads it."""

from typing import Any

import lightning as L
import torch

from bae.advantages import advantages, sum_by_block
from bae.baselines import Baseline, BlockRewards
from bae.batch import Advantages, RolloutBatch, group_index
from bae.distributed import gather
from bae.rollout.pipeline import Pipeline


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
    """

    def __init__(self, pipeline: Pipeline, baseline: Baseline, first_block_baseline: Baseline):
        self.scorer = pipeline.scorer
        self.baseline = baseline
        self.first_block_baseline = first_block_baseline

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        _, scored = batch.rolled_out()
        # Every rank weighs the whole batch: a batch mean is over all of it, and other baselines cost nothing.
        rewards, present = gather(trainer, scored.rewards), gather(trainer, scored.present)
        group = group_index(len(rewards), batch.group_size)
        names = [objective.name for objective in self.scorer.objectives]
        baselines = torch.zeros_like(rewards)
        for j, objective in enumerate(self.scorer.objectives):
            if objective.given is None:
                outcome, baseline = torch.zeros_like(group), self.first_block_baseline
            else:
                _, outcome = rewards[:, names.index(objective.given)].unique(return_inverse=True)
                baseline = self.baseline
            baselines[:, j] = baseline(BlockRewards(rewards[:, j], group, outcome, present[:, j]))
        mine = slice(trainer.global_rank * len(scored.rewards), (trainer.global_rank + 1) * len(scored.rewards))
        per_objective = advantages(rewards, baselines, present)[mine]
        weights = [objective.weight for objective in self.scorer.objectives]
        per_block = sum_by_block(per_objective, self.scorer.block_of_objective, weights, len(self.scorer.blocks))
        batch.advantages = Advantages(per_objective, per_block)
