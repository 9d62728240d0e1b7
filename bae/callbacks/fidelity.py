"""How near every baseline comes to Monte Carlo, as training goes on."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from pandas import DataFrame

from bae.batch import RolloutBatch
from bae.callbacks.checks import at_least_one
from bae.callbacks.collectives import gather_objects
from bae.evaluation.completion_table import merge
from bae.fidelity.measure import check_conditioned, check_nested, compare, measure
from bae.method.baselines import Baseline
from bae.method.stated_numbers import Candidates
from bae.objectives.outcomes import Outcome
from bae.rollout.pipeline import Pipeline

DRAWS = 2**32 - 5
"""In the place of a step in the seeds of its groups; no training step has this number."""


class Fidelity(L.Callback):
    """Every `every` steps, `bae-fidelity` in small: logs `fidelity/<objective>/<baseline>/…`, the RMSE of each of
    `baselines` against Monte Carlo, whatever baseline trains, beside the run's own metrics.

    split, prompts: the first so many problems of a split. group_size, rollouts, nested, seed: as of bae-fidelity.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        baselines: Mapping[str, Baseline],
        fallback_baseline: Baseline,
        outcome: Outcome,
        every: int,
        split: str,
        prompts: int,
        group_size: int,
        rollouts: int,
        nested: int,
        micro_batch_tokens: int,
        seed: int,
    ):
        at_least_one("fidelity", every=every)
        check_conditioned(pipeline.scorer.objectives)
        check_nested(baselines, nested)
        self.pipeline = pipeline
        self.baselines = baselines
        self.fallback_baseline = fallback_baseline
        self.outcome = outcome
        self.every = every
        self.split = split
        self.prompts = min(prompts, pipeline.task.size(split))
        self.group_size = group_size
        self.rollouts = rollouts
        self.nested = nested
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.candidates = Candidates(pipeline.scorer.vocabulary, pipeline.scorer.closing)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if done % self.every and done != trainer.num_training_batches:
            return
        mine = range(trainer.global_rank, self.prompts, trainer.world_size)
        parts = [self._measure(mine)] if mine else []  # there may be more ranks than prompts
        table = merge([part for each in gather_objects(trainer, parts) for part in each])
        if table.empty:  # no completion reached a later block
            return
        results, _ = compare(table, self.baselines, self.fallback_baseline, [self.group_size], None, resamples=2)
        logged = {
            f"fidelity/{row['objective']}/{row['baseline']}/{name}": row[name]
            for row in results[results["set"] == "all"].to_dict("records")
            for name in ("rmse", "bias", "slope", "correlation")
        }
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=done)

    def _measure(self, mine: Sequence[int]) -> DataFrame:
        table, _ = measure(
            self.pipeline, self.outcome, self.candidates, [self.pipeline.task.problem(self.split, i) for i in mine],
            [(self.seed, DRAWS, i) for i in mine], self.group_size, self.rollouts, self.nested, self.micro_batch_tokens,
        )  # fmt: skip
        return table
