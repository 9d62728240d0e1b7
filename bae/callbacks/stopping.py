"""Stop a run by a signal, at the end of a step, on all ranks together."""

import os
import subprocess
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint

from bae.batch import RolloutBatch
from bae.callbacks.checkpoints import Checkpoints
from bae.callbacks.collectives import gather
from bae.signals import StopSignals


class StopAtStepEnd(Checkpoint):
    """Ask at the end of every step whether a rank got a signal; then save a checkpoint and raise `Stopped` on all.

    This is a Lightning `Checkpoint`, so it runs after all other callbacks.

    Args:
        signals: of this process; their handlers are set already.

    Attributes:
        agreed: whether all ranks stop together.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self.agreed = False

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        # Lightning's handlers talk to other ranks while these may do something else, and exit with 0. It has no option
        # for others.
        trainer._signal_connector.register_signal_handlers = self.signals.install  # type: ignore[method-assign]
        self.signals.deferred = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        done = batch.step + 1
        if done == trainer.num_training_batches and trainer.world_size == 1:
            self.signals.deferred = False  # no step ends any more. Several ranks finish what they do together
        signum = int(gather(trainer, torch.tensor([self.signals.received])).max())
        if not signum:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.save(trainer, done)
        self.agreed = True
        self.signals.stop(signum)


def requeue_in_slurm(trainer: L.Trainer) -> str | None:
    """Ask Slurm to run this job again, where Lightning would, and return a sentence if that fails.

    Lightning does so under `srun`, unless its SLURMEnvironment says auto_requeue=False. Its own handler is not used: it
    keeps the checkpoint in the working directory, where any other run would take it up.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None and SLURMEnvironment.detect():
        environment = SLURMEnvironment()
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        return f"scontrol requeue {job} failed: {' '.join(told.split())}"
    return None
