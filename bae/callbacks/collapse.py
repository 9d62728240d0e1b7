"""A warning if the policy states one confidence for all completions."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from bae.batch import RolloutBatch
from bae.callbacks.collectives import gather
from bae.callbacks.schedule import at_least_one
from bae.rollout.pipeline import Pipeline

MODE_SHARE = "confidence_mode_share"


class ConfidenceCollapse(L.Callback):
    """Write into `metrics` how stated confidences spread over all ranks (see `confidence_spread`), and warn.

    It warns once when at least a share `mode_share` has stated the same confidence for `patience` steps in a row, and
    again after a recovery. A step without any stated confidence counts neither way. It needs only the rollouts, so it
    may stand anywhere after Rollouts.

    Raises:
        ValueError: if mode_share is no share or patience is below 1.
    """

    def __init__(self, pipeline: Pipeline, mode_share: float, patience: int) -> None:
        if not 0 < mode_share <= 1:
            raise ValueError(f"callbacks.collapse.mode_share={mode_share}: a share above 0, 1 at most")
        at_least_one("collapse", patience=patience)
        self.mode_share = mode_share
        self.patience = patience
        self.streak = 0  # steps in a row in which the mode had its share; so there is one warning, at `patience`

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        _, scored = batch.require_rollouts()
        numbers = [torch.nan if c.confidence is None else c.confidence for c in scored.completions]
        confidence = gather(trainer, torch.tensor(numbers, dtype=torch.double))
        correct = gather(trainer, torch.tensor([c.correct for c in scored.completions]))
        stated = ~confidence.isnan()
        if not stated.any():
            return
        spread = confidence_spread(confidence[stated], correct[stated])
        batch.metrics |= spread
        self.streak = self.streak + 1 if spread[MODE_SHARE] >= self.mode_share else 0
        if self.streak == self.patience:
            mode = confidence[stated].mode().values.item()
            rank_zero_warn(self._warning(batch.step + 1, mode, spread[MODE_SHARE]))

    def _warning(self, step: int, mode: float, share: float) -> str:
        """Return the text of the warning; step: as metrics count."""
        return (
            f"the stated confidence has collapsed: at step {step}, {share:.0%} of the completions that state one say "
            f"{mode:g}, and at least {self.mode_share:.0%} have agreed since step {step - self.patience + 1}; usually "
            "this is reward hacking, a constant that pays whatever the answer: see whether train/accuracy fell since "
            "then, what train/confidence_std/correct and …/wrong are, and read the table of completions"
        )

    def state_dict(self) -> dict[str, int]:
        return {"streak": self.streak}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.streak = state["streak"]


def confidence_spread(confidence: Tensor, correct: Tensor) -> dict[str, float]:
    """Measure how stated confidences spread.

    Args:
        confidence: (N,), N at least 1.
        correct: (N,) bool.

    Returns:
        confidence_distinct: how many different confidences there are.
        confidence_mode_share: the share of the most frequent one.
        confidence_std/correct and /wrong: the standard deviation among completions with a right and with a wrong
            answer, NaN if there are none.
    """
    _, counts = confidence.unique(return_counts=True)
    found = {"confidence_distinct": float(len(counts)), MODE_SHARE: counts.max().item() / len(confidence)}
    for name, those in (("correct", correct), ("wrong", ~correct)):
        mine = confidence[those]
        found[f"confidence_std/{name}"] = (mine - mine.mean()).square().mean().sqrt().item()
    return found
