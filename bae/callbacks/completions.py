"""A table of sampled completions in MLflow, so that a program can read what the policy writes."""

from typing import Any

import lightning as L
import torch

from bae.batch import RolloutBatch
from bae.callbacks.run_logger import run_logger
from bae.callbacks.schedule import at_least_one, due
from bae.evaluation.completion_table import columns
from bae.rollout.pipeline import Pipeline


class CompletionTable(L.Callback):
    """Log `rows` completions of the first, of every `every`-th and of the last step.

    The columns are those of bae.evaluation.completion_table, the text of each block, and each objective's reward and
    advantage, as the update applied it.

    Raises:
        ValueError: if every is below 1.
    """

    def __init__(self, pipeline: Pipeline, every: int, rows: int) -> None:
        at_least_one("completions", every=every)
        self.pipeline = pipeline
        self.every = every
        self.rows = rows

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if trainer.is_global_zero and (done == 1 or due(done, self.every, trainer.num_training_batches)):
            run_logger(trainer).log_completions(self._table(batch), step=done)

    def _table(self, batch: RolloutBatch) -> dict[str, list]:
        samples, scored = batch.require_rollouts()
        scorer = self.pipeline.scorer
        chosen = scored.completions[: self.rows]
        table = {"step": [batch.step + 1] * len(chosen), **columns(chosen, scorer.attempts)}
        for k, block in enumerate(scorer.blocks):
            ids = [samples.completion_ids[n][scored.block_of[n] == k] for n in range(len(chosen))]
            table[f"block/{block.name}"] = [self.pipeline.policy.tokenizer.decode(row) for row in ids]
        for j, objective in enumerate(scorer.objectives):
            table[f"reward/{objective.name}"] = _column(scored.rewards, j, len(chosen))
            table[f"advantage/{objective.name}"] = _column(batch.require_advantages().per_objective, j, len(chosen))
        return table


def _column(values: torch.Tensor, j: int, rows: int) -> list[float]:
    return [round(v, 4) for v in values[:rows, j].tolist()]
