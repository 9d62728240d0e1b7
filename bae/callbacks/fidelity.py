"""Measure how near every baseline comes to Monte Carlo, as training goes on."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from pandas import DataFrame

from bae.batch import RolloutBatch
from bae.callbacks.collectives import gather_objects
from bae.callbacks.run_logger import run_logger
from bae.callbacks.schedule import at_least_one, due
from bae.evaluation.completion_table import merge
from bae.fidelity.compare import compare_advantages
from bae.fidelity.measure import Study, check_conditioned, check_nested
from bae.method.baselines import Baseline
from bae.objectives.outcomes import Outcome
from bae.rollout.pipeline import Pipeline
from bae.seeds import Namespace, key


class Fidelity(L.Callback):
    """Log `fidelity/<objective>/<baseline>/…`, the RMSE of each baseline against Monte Carlo: `bae-fidelity` in small.

    It is logged beside the run's own metrics, whatever baseline trains.

    Args:
        pipeline: the policy, and the objectives.
        baselines: the baselines to compare, by name.
        fallback_baseline: the baseline where one has none.
        outcome: of a prefix; what baselines may condition on.
        every: steps between two measurements; the last step is always measured.
        split, prompts: the first so many problems of a split.
        group_size, rollouts, nested, micro_batch_tokens: as of bae-fidelity; see bae.fidelity.measure.Study.
        seed: of the draws.

    Raises:
        ValueError: if no objective is conditioned on an outcome, if a baseline needs more samples than `nested`, and if
            `every` is below 1.
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
    ) -> None:
        at_least_one("fidelity", every=every)
        check_conditioned(pipeline.scorer.objectives)
        check_nested(baselines, nested)
        self.study = Study(pipeline, outcome, group_size, rollouts, nested, micro_batch_tokens)
        self.baselines = baselines
        self.fallback_baseline = fallback_baseline
        self.every = every
        self.split = split
        self.prompts = min(prompts, pipeline.task.size(split))
        self.seed = seed

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if not due(done, self.every, trainer.num_training_batches):
            return
        mine = range(trainer.global_rank, self.prompts, trainer.world_size)
        parts = [self._measure(mine)] if mine else []  # there may be more ranks than prompts
        table = merge([part for each in gather_objects(trainer, parts) for part in each])
        if table.empty:  # no completion reached a later block
            return
        sizes = [self.study.group_size]
        results, _ = compare_advantages(table, self.baselines, self.fallback_baseline, sizes, None, resamples=2)
        logged = {
            f"fidelity/{row['objective']}/{row['baseline']}/{name}": row[name]
            for row in results[results["set"] == "all"].to_dict("records")
            for name in ("rmse", "bias", "slope", "correlation")
        }
        run_logger(trainer).log_metrics(logged, step=done)

    def _measure(self, mine: Sequence[int]) -> DataFrame:
        """Return the table of some problems; mine: their numbers in the split."""
        problems = [self.study.pipeline.task.problem(self.split, i) for i in mine]
        table, _ = self.study.measure(problems, [key(self.seed, Namespace.FIDELITY_IN_TRAINING, i) for i in mine])
        return table
