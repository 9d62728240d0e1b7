"""Calibration on problems that training never sees, before, during and after it."""

from pathlib import Path
from typing import Any

import lightning as L
import pandas
from pandas import DataFrame

from bae import seeds
from bae.batch import RolloutBatch
from bae.callbacks.collectives import gather_objects
from bae.callbacks.run_logger import run_logger
from bae.callbacks.schedule import at_least_one, due, not_negative
from bae.callbacks.telemetry import completion_metrics
from bae.errors import UserError
from bae.evaluation.completion_table import by_attempt, columns, frame, merge
from bae.evaluation.measure import test_time_scaling
from bae.evaluation.voting import metric_name
from bae.files import atomically
from bae.rollout.pipeline import Pipeline

FOLDER = "held_out"
"""The folder of a run that has a table for each time that held-out problems were measured."""
KEPT = ("prompt", "verdict", "correct", "confidence")
"""Columns of the completion table that are kept, those of further answers among them. Texts would take much room."""


class HeldOut(L.Callback):
    """Measure held-out problems before the first step, every `every` steps and after the last one.

    What was measured after a step is written on its batch, too.

    The draws are the same each time, so two evaluations differ only by the policy.

    Args:
        pipeline: encodes, samples and scores.
        split: of the task.
        prompts: the first so many problems of the split.
        samples: completions of each problem.
        every: steps between two times; 0 for only before and after.
        seed: of the draws.
        prefix: metrics are logged as `<prefix>/…`.
        folder: what was measured is written in its folder `held_out`, a table for each time.

    Raises:
        ValueError: for numbers that cannot work.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        split: str,
        prompts: int,
        samples: int,
        every: int,
        seed: int,
        prefix: str,
        folder: str,
    ) -> None:
        at_least_one("held_out", prompts=prompts, samples=samples)
        not_negative("held_out", every=every)
        self.pipeline = pipeline
        self.split = split
        self.prompts = min(prompts, pipeline.task.size(split))
        self.samples = samples
        self.every = every
        self.seed = seed
        self.prefix = prefix
        self.folder = Path(folder)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self.prompts < trainer.world_size:
            raise UserError(
                f"callbacks.held_out.prompts={self.prompts}: each of the {trainer.world_size} ranks needs one; use more"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx < 0:  # a resumed run has been measured before
            self._measure(trainer, 0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if due(done, self.every, trainer.num_training_batches):
            batch.held_out = self._measure(trainer, done)

    def _measure(self, trainer: L.Trainer, step: int) -> dict[str, float]:
        """Measure and log the metrics after a step, and return them under their full names."""
        rank, world = trainer.global_rank, trainer.world_size
        if rank == 0 and step == 0:
            print(f"measuring {self.prompts * self.samples} completions of held-out problems first", flush=True)
        share = self.prompts // world  # equal shares: every rank gathers the same number of rows
        mine = range(rank * share, (rank + 1) * share)
        problems = [self.pipeline.task.problem(self.split, i) for i in mine]
        keys = [seeds.key(self.seed, seeds.Namespace.HELD_OUT, i) for i in mine]
        _, scored, _ = self.pipeline(problems, keys, self.samples)
        metrics = completion_metrics(trainer, scored, self.pipeline.scorer)
        own = frame([columns(scored.completions, self.pipeline.scorer.attempts)])
        table = merge(gather_objects(trainer, own))  # of all: which votes there are depends on what was stated
        if self.samples > 1:
            metrics |= self._votes(table)
        named = {f"{self.prefix}/{name}": value for name, value in metrics.items()}
        run_logger(trainer).log_metrics(named, step)
        if trainer.is_global_zero:
            with atomically(self.folder / FOLDER / f"step_{step:06d}.parquet") as file:
                table[[name for name in table if name.startswith(KEPT)]].to_parquet(file)
        return named

    def _votes(self, table: DataFrame) -> dict[str, float]:
        """Return the accuracy of each way to choose among all samples of a problem, attempt by attempt."""
        return {
            f"{attempt}/{metric_name(strategy)}".lstrip("/"): curve[-1]
            for attempt, view in by_attempt(table).items()
            for strategy, curve in test_time_scaling(view, self.pipeline.task.verifier).items()
        }


def measurements(folder: Path) -> dict[int, DataFrame]:
    """Return {step: table} of what HeldOut wrote in the folder of a run, in the order of steps."""
    files = sorted((folder / FOLDER).glob("step_*.parquet"))
    return {int(file.stem.removeprefix("step_")): pandas.read_parquet(file) for file in files}
