"""A page of sampled completions in MLflow, so that a person can see what the policy writes, and what it earns."""

from typing import Any

import lightning as L

from bae.batch import RolloutBatch
from bae.callbacks.run_logger import run_logger
from bae.callbacks.schedule import at_least_one, due
from bae.evaluation.completion_page import GroupView, page
from bae.evaluation.completion_view import Viewer
from bae.rollout.pipeline import Pipeline


class CompletionPage(L.Callback):
    """Log a page of the first, of every `every`-th and of the last step, such as completions/step_000050.html.

    It shows the first problems of the first rank, with the advantages as the update applied them. For a baseline that
    is finished in the training pass, they are means over the tokens of a block.

    Args:
        pipeline: has the format and the objectives.
        every: steps between two pages.
        prompts: problems of a page, at most.
        completions: of each problem, at most.
        characters: of each part of a text, at most.

    Raises:
        ValueError: if a number is below 1.
    """

    def __init__(self, pipeline: Pipeline, every: int, prompts: int, completions: int, characters: int) -> None:
        at_least_one("completion_page", every=every, prompts=prompts, completions=completions, characters=characters)
        self.scorer = pipeline.scorer
        self.every = every
        self.prompts = prompts
        self.completions = completions
        self.characters = characters

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if trainer.is_global_zero and (done == 1 or due(done, self.every, trainer.num_training_batches)):
            made = page(f"Completions of step {done}", self._groups(batch), self.characters)
            run_logger(trainer).log_text(made, f"completions/step_{done:06d}.html")

    def _groups(self, batch: RolloutBatch) -> list[GroupView]:
        """Return the groups that are shown."""
        samples, scored = batch.require_rollouts()
        advantages, size = batch.require_advantages(), batch.group_size
        viewer = Viewer(samples, scored, self.scorer, size, advantages, advantages.outcomes)
        groups = []
        for p, problem in enumerate(batch.problems[: self.prompts]):
            rows = range(p * size, (p + 1) * size)
            groups.append(
                GroupView(
                    problem=problem,
                    completions=[viewer.view(n) for n in rows[: self.completions]],
                    size=size,
                    right=sum(scored.completions[n].correct for n in rows),
                )
            )
        return groups
