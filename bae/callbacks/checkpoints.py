"""Checkpoints to resume from, and the finished policy as anyone can load it."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from bae.batch import RolloutBatch
from bae.callbacks.run_logger import run_logger
from bae.callbacks.schedule import at_least_one, due
from bae.errors import UserError
from bae.rollout.pipeline import Pipeline
from bae.training.finite import non_finite


class Checkpoints(Checkpoint):
    """Save `<folder>/checkpoints/step_000050.ckpt` every so many steps, and `<folder>/policy` after the last step.

    The policy is saved as safetensors, configuration and tokenizer, and goes to the loggers, too. This is a Lightning
    `Checkpoint`, so it runs after all other callbacks and sees what they changed.

    Args:
        pipeline: has the policy.
        folder: the output folder of the run.
        every: steps between two checkpoints.
        keep: checkpoints that are kept, the newest ones.
        log_policy: whether the policy goes to the loggers.

    Raises:
        ValueError: if every or keep is below 1.
    """

    def __init__(self, pipeline: Pipeline, folder: str, every: int, keep: int, log_policy: bool = True) -> None:
        at_least_one("checkpoints", every=every, keep=keep)
        self.policy = pipeline.policy
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self.log_policy = log_policy

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if not due(done, self.every, trainer.num_training_batches):
            return
        run_logger(trainer).sync()  # a run that goes on from this checkpoint does not log the steps before it again
        trainer.save_checkpoint(self.folder / "checkpoints" / f"step_{done:06d}.ckpt")
        if trainer.is_global_zero:
            for old in saved_checkpoints(self.folder)[: -self.keep]:
                old.unlink()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # A finished run that is made longer would stop at once: Lightning remembers that its batch was the last.
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and trainer.num_training_batches:
            self.policy.save(self.folder / "policy")
            if self.log_policy:
                run_logger(trainer).log_folder(self.folder / "policy")


def saved_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("step_*.ckpt"))


def last_good(folder: Path) -> str:
    """Say which checkpoint of a run one can go on from, for the end of a message; folder: the run's."""
    saved = saved_checkpoints(folder)
    if not saved:
        return "there is no checkpoint to go on from"
    return f"the last good checkpoint is {saved[-1]}, which resume={folder} goes on from"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target and rename, so that a run killed while saving keeps the previous checkpoint whole.

    It raises UserError for weights and optimiser states that are not finite: no run could go on from them.

    Lightning's own goes through $TMPDIR, which may be another file system, where a move is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        saved: dict[str, Any] = {
            key: checkpoint[key] for key in ("state_dict", "optimizer_states") if key in checkpoint
        }
        if (name := non_finite(saved)) is not None:
            raise UserError(
                f"{target.name} is not saved, because {name} has numbers that are not finite; "
                f"{last_good(target.parent.parent)}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
