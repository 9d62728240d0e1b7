"""Faults that tests inject into runs: rewards, and callbacks that spoil numbers."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from bae.batch import Completion
from bae.tasks.loader import problem_indices


def spoiled(completion: Completion, problems: Sequence[str], value: float) -> float | None:
    """Correctness; but `value` for the completions of these problems."""
    return value if completion.problem.id in problems else float(completion.correct) if completion.verdicts else None


def problems_of(step: int, count: int, seed: int = 0, size: int = 200_000) -> list[str]:
    """The ids of a step's problems, all ranks, for the task arithmetic."""
    return [f"train/{i}" for i in problem_indices(seed, step, size, count)]


class BadGradient(L.Callback):
    """Make a number of the gradient NaN, in one step on one rank."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (batch.step, trainer.global_rank) == (self.step, self.rank):
            weight = next(pl_module.model.parameters())
            hook = weight.register_hook(lambda gradient: (hook.remove(), gradient * torch.nan)[1])


class BadWeight(L.Callback):
    """Make a weight infinite after a step, as an optimiser step may that overflows."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch.step == self.step:
            step = pl_module.update.step

            def spoiling(work: Any) -> None:
                step(work)
                next(pl_module.model.parameters()).data.view(-1)[0] = torch.inf

            pl_module.update.step = spoiling
