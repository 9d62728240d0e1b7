"""Checkpoints to resume from, and the finished policy as anyone can load it."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from bae.batch import RolloutBatch
from bae.callbacks.best import FOLDER, Best
from bae.callbacks.run_logger import run_logger
from bae.callbacks.schedule import at_least_one, due
from bae.errors import UserError
from bae.files import PARTIAL, SUMS, DamagedError, atomically, check_folder, checksum, remove, write_atomically
from bae.rollout.pipeline import Pipeline
from bae.training.finite import non_finite


class Checkpoints(Checkpoint):
    """Save `<folder>/checkpoints/step_000050.ckpt` every so many steps, and `<folder>/policy` after the last step.

    The policy is saved as safetensors, configuration and tokenizer, and goes to the loggers, too. This is a Lightning
    `Checkpoint`, so it runs after all other callbacks and sees what they changed. With `best`, the policy that was best
    on held-out problems is saved in `<folder>/policy_best` in the same way.

    Args:
        pipeline: has the policy.
        folder: the output folder of the run.
        every: steps between two checkpoints.
        keep: checkpoints that are kept, the newest ones.
        log_policy: whether the policy goes to the loggers; the best one, too.
        best: the metric of held-out problems by which the best policy is kept, such as val/ece; None for none.

    Raises:
        ValueError: if every or keep is below 1, and for a metric of which it is not known whether low or high is good.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        folder: str,
        every: int,
        keep: int,
        log_policy: bool = True,
        best: str | None = None,
    ) -> None:
        at_least_one("checkpoints", every=every, keep=keep)
        self.policy = pipeline.policy
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self.log_policy = log_policy
        self.best = Best(self.policy, self.folder, best) if best else None
        self.saved: int | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if self.best is not None:
            self.best.see(batch.held_out, done, trainer.is_global_zero)
        if due(done, self.every, trainer.num_training_batches):
            self.save(trainer, done)

    def save(self, trainer: L.Trainer, done: int) -> None:
        """Save a checkpoint after `done` steps, unless this process has just done so. All ranks must call it."""
        if done == self.saved:
            return
        run_logger(trainer).sync()  # a run that goes on from this checkpoint does not log the steps before it again
        trainer.save_checkpoint(self.folder / "checkpoints" / f"step_{done:06d}.ckpt")
        self.saved = done
        if trainer.is_global_zero:
            # Later ones are there if they are damaged and the run went on from one before. They do not count.
            for old in [path for path in saved_checkpoints(self.folder) if step_of(path) <= done][: -self.keep]:
                remove(old)
                remove(sums_of(old))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # A finished run that is made longer would stop at once: Lightning remembers that its batch was the last.
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and trainer.num_training_batches:
            self.policy.save(self.folder / "policy")
            for name in ("policy", FOLDER):
                if self.log_policy and (self.folder / name).is_dir():
                    run_logger(trainer).log_folder(self.folder / name)


def saved_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("step_*.ckpt"))


def last_good(folder: Path) -> str:
    """Say which checkpoint of a run one can go on from, for the end of a message; folder: the run's."""
    saved = saved_checkpoints(folder)
    if not saved:
        return "there is no checkpoint to go on from"
    return f"the last good checkpoint is {saved[-1]}, which resume={folder} goes on from"


def step_of(checkpoint: Path) -> int:
    """Return the number of steps after which a checkpoint was saved."""
    return int(checkpoint.stem.removeprefix("step_"))


def sums_of(checkpoint: Path) -> Path:
    """Return the file with the checksum of a checkpoint, beside it; `sha256sum -c` reads it."""
    return checkpoint.with_suffix(".ckpt.sha256")


def is_sound(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is what was written.

    One without a checksum, of an earlier version or of a run that was killed between the two files, is a zip archive
    that has checksums of its parts.
    """
    try:
        if checkpoint.is_dir():  # of several ranks (bae.callbacks.fully_sharded)
            check_folder(checkpoint)
            return (checkpoint / SUMS).is_file()
        if sums_of(checkpoint).is_file():
            return sums_of(checkpoint).read_text(errors="replace").split()[:1] == [checksum(checkpoint)]
        with zipfile.ZipFile(checkpoint) as archive:
            return archive.testzip() is None
    except (OSError, DamagedError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return False


def sound_checkpoints(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest checkpoint of a run that is sound, None if none is, and the newer ones, which are damaged."""
    damaged: list[Path] = []
    for checkpoint in reversed(saved_checkpoints(folder)):
        if is_sound(checkpoint):
            return checkpoint, damaged
        damaged.append(checkpoint)
    return None, damaged


def not_finite(states: Mapping[str, Any], target: Path) -> UserError | None:
    """Return the refusal to save weights and optimiser states from which no run could go on; None if one could."""
    if (name := non_finite(states)) is None:
        return None
    return UserError(
        f"{target.name} is not saved, because {name} has numbers that are not finite; {last_good(target.parent.parent)}"
    )


def clear_place(target: Path) -> None:
    """Remove what a killed process left beside a checkpoint, and the checksum of an older one of this name."""
    for left in target.parent.glob(f"*{PARTIAL}"):
        remove(left)
    remove(sums_of(target))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target and rename, so that a run killed while saving keeps the previous checkpoint whole.

    A checksum is written beside it. It raises UserError for weights and optimiser states that are not finite: no run
    could go on from them.

    Lightning's own goes through $TMPDIR, which may be another file system, where a move is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        states: dict[str, Any] = {
            key: checkpoint[key] for key in ("state_dict", "optimizer_states") if key in checkpoint
        }
        if refusal := not_finite(states, target):
            raise refusal
        clear_place(target)
        with atomically(target) as file:
            torch.save(checkpoint, file)
        write_atomically(sums_of(target), f"{checksum(target)}  {target.name}\n")
