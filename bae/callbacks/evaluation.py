"""The evaluation that tables are made from, once, after the last step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L

from bae.callbacks.collectives import gather_objects
from bae.callbacks.run_logger import run_logger
from bae.callbacks.schedule import at_least_one
from bae.evaluation.completion_table import merge
from bae.evaluation.measure import measure, sample
from bae.rollout.pipeline import Pipeline


class Evaluation(L.Callback):
    """Sample each of `splits` and log `eval/<split>/…`, the completions and the figures, as `bae-evaluate` does.

    Args:
        pipeline: with the policy in memory.
        splits: of the task.
        prompts: of each split, None for all.
        samples: completions of each prompt.
        seed: of the draws.
        folder: where `evaluation/` is written.
        max_new_tokens: None for training's.

    Raises:
        ValueError: for a split that is not there, and for numbers that cannot work.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        splits: list[str],
        prompts: int | None,
        samples: int,
        seed: int,
        folder: str,
        max_new_tokens: int | None = None,
    ) -> None:
        given = {"prompts": prompts, "samples": samples, "max_new_tokens": max_new_tokens}
        at_least_one("evaluation", **{name: value for name, value in given.items() if value is not None})
        for split in splits:
            pipeline.task.size(split)  # raises for a split that is not there, before any work
        self.pipeline = replace(pipeline, max_new_tokens=max_new_tokens or pipeline.max_new_tokens)
        self.splits = splits
        self.prompts = prompts
        self.samples = samples
        self.seed = seed
        self.folder = Path(folder) / "evaluation"

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        for split in self.splits:
            part = sample(self.pipeline, split, self.prompts, self.samples, self.seed,
                          trainer.global_rank, trainer.world_size)  # fmt: skip
            table = merge(gather_objects(trainer, part))
            if trainer.is_global_zero:
                summaries, files = measure(table, self.pipeline.task.verifier, self.folder, split)
                run_logger(trainer).log_evaluation(summaries, files)
