"""What happens to steps that the update skipped, because something in them was not finite."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tqdm import tqdm

from bae.batch import RolloutBatch
from bae.callbacks.checkpoints import last_good
from bae.callbacks.collectives import gather, gather_objects
from bae.callbacks.schedule import at_least_one
from bae.errors import UserError
from bae.rollout.pipeline import Pipeline
from bae.training.finite import all_finite


class SkippedSteps(L.Callback):
    """Name each skipped step in one line, write its completions to a file, and stop a run that skips too many.

    The update skips a step if its loss or its gradient is not finite, and changes no weight then; an infinite reward
    makes such a step. This callback stands after the one that logs `train/skipped`. Weights that are not finite stop
    the run at once, because nothing can be sampled with them.

    Args:
        pipeline: has the objectives and the tokenizer.
        folder: the output folder of the run; the files are `<folder>/skipped/step_000901.jsonl`, a line for each
            completion.
        patience: consecutive skipped steps after which the run stops.
        completions: that a file has at most; those with a reward that is not finite come first.
        keep: files that are kept, the newest ones.

    Raises:
        ValueError: if patience, completions or keep is below 1.
        UserError: from the hooks, on all ranks alike, if the run cannot go on.
    """

    def __init__(self, pipeline: Pipeline, folder: str, patience: int, completions: int, keep: int) -> None:
        at_least_one("skipped", patience=patience, completions=completions, keep=keep)
        self.objectives = [objective.name for objective in pipeline.scorer.objectives]
        self.tokenizer = pipeline.policy.tokenizer
        self.folder = Path(folder)
        self.patience = patience
        self.completions = completions
        self.keep = keep
        self.in_a_row = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not _has_finite_weights(trainer, pl_module):
            raise UserError("the policy's weights are not finite before training; load another model or checkpoint")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if not _has_finite_weights(trainer, pl_module):
            raise UserError(
                f"the policy's weights are not finite after step {done}; try a lower lr, {last_good(self.folder)}"
            )
        self.in_a_row = self.in_a_row + 1 if batch.metrics["skipped"] else 0
        if not self.in_a_row:
            return
        rows = [row for rank in gather_objects(trainer, self._rows(batch)) for row in rank]
        rows = sorted(rows, key=_is_usual)[: self.completions]
        reason = self._reason(batch, rows)
        if trainer.is_global_zero:
            tqdm.write(f"step {done} is skipped: {reason}; see {self._write(done, rows)}", file=sys.stderr)
        if self.in_a_row >= self.patience:
            raise UserError(
                f"the last {self.in_a_row} steps were skipped (callbacks.skipped.patience), step {done} because "
                f"{reason}; {self.folder / 'skipped'} has their completions; {last_good(self.folder)}"
            )

    def _rows(self, batch: RolloutBatch) -> list[dict[str, Any]]:
        """Return what a file tells of the completions of this rank."""
        if batch.scored is None:  # a warm start
            samples = batch.require_demonstrations().samples
            texts = self.tokenizer.batch_decode(samples.completion_ids[: self.completions])
            return [{"step": batch.step + 1, "text": text, "rewards": {}} for text in texts]
        rows = [
            {
                "step": batch.step + 1,
                "problem": completion.problem.id,
                "question": completion.problem.question,
                "reference": completion.problem.answer,
                "text": completion.text,
                # As JSON knows no infinity, it is the text "inf".
                "rewards": {
                    n: r if math.isfinite(r) else str(r) for n, r in zip(self.objectives, rewards, strict=True)
                },
            }
            for completion, rewards in zip(batch.scored.completions, batch.scored.rewards.tolist(), strict=True)
        ]
        return sorted(rows, key=_is_usual)[: self.completions]

    def _reason(self, batch: RolloutBatch, rows: list[dict[str, Any]]) -> str:
        """Return why a step was skipped; rows: of all ranks."""
        for row in rows:
            for name, reward in row["rewards"].items():
                if isinstance(reward, str):
                    return f"the reward {name} of a completion of problem {row['problem']} is {reward}"
        norm = batch.metrics["grad_norm"]
        return "the loss is not finite" if math.isfinite(norm) else f"the norm of its gradient is {norm}"

    def _write(self, done: int, rows: list[dict[str, Any]]) -> Path:
        """Write the file of a step, remove the oldest ones, and return its path."""
        path = self.folder / "skipped" / f"step_{done:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
        for old in sorted(path.parent.glob("step_*.jsonl"))[: -self.keep]:
            old.unlink()
        return path

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.in_a_row = state["in_a_row"]


def _has_finite_weights(trainer: L.Trainer, pl_module: Any) -> bool:
    """Tell whether all weights of all ranks are finite."""
    return bool(gather(trainer, torch.tensor([all_finite(pl_module.model.parameters())])).all())


def _is_usual(row: dict[str, Any]) -> bool:
    """Tell whether all rewards of a completion are finite; False sorts first."""
    return not any(isinstance(reward, str) for reward in row["rewards"].values())
