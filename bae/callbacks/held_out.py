"""Calibration on problems that training never sees, before, during and after it."""

from collections.abc import Sequence
from typing import Any

import lightning as L

from bae.batch import Completion, RolloutBatch
from bae.callbacks.collectives import gather_objects
from bae.callbacks.telemetry import completion_metrics
from bae.evaluation.completion_table import by_attempt, columns, frame, merge
from bae.evaluation.measure import test_time_scaling
from bae.evaluation.voting import metric_name
from bae.rollout.pipeline import Pipeline


class HeldOut(L.Callback):
    """Samples the first `prompts` problems of `split` and logs `<prefix>/…` before the first step, every `every`
    steps and after the last one. The draws are the same each time, so that two evaluations differ by the policy.

    every: 0 for before and after alone. samples: completions of each problem.
    """

    def __init__(self, pipeline: Pipeline, split: str, prompts: int, samples: int, every: int, seed: int, prefix: str):
        self.pipeline = pipeline
        self.split = split
        self.prompts = min(prompts, pipeline.task.size(split))
        self.samples = samples
        self.every = every
        self.seed = seed
        self.prefix = prefix

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx < 0:  # a resumed run has been measured before
            self._measure(trainer, 0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if done == trainer.num_training_batches or (self.every and done % self.every == 0):
            self._measure(trainer, done)

    def _measure(self, trainer: L.Trainer, step: int) -> None:
        rank, world = trainer.global_rank, trainer.world_size
        share = self.prompts // world  # equal shares: every rank gathers the same number of rows
        mine = range(rank * share, (rank + 1) * share)
        problems = [self.pipeline.task.problem(self.split, i) for i in mine]
        # 2 ** 32 - 1 keeps these draws apart from those of every training step.
        _, scored, _ = self.pipeline(problems, [(self.seed, 2**32 - 1, i) for i in mine], self.samples)
        metrics = completion_metrics(trainer, scored, self.pipeline.scorer)
        if self.samples > 1:
            metrics |= self._votes(trainer, scored.completions)
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.prefix}/{name}": value for name, value in metrics.items()}, step=step)

    def _votes(self, trainer: L.Trainer, completions: Sequence[Completion]) -> dict[str, float]:
        """Accuracy of each way to choose among all samples of a problem, attempt by attempt."""
        mine = frame([columns(completions, self.pipeline.scorer.attempts)])
        table = merge(gather_objects(trainer, mine))  # of all: which strategies there are depends on what was stated
        return {
            f"{attempt}/{metric_name(strategy)}".lstrip("/"): curve[-1]
            for attempt, view in by_attempt(table).items()
            for strategy, curve in test_time_scaling(view, self.pipeline.task.verifier).items()
        }
