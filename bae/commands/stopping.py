"""Leave a run that a signal or a full disk stops: its status, its last words, and how to go on with it."""

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bae.commands import cli, sweep
from bae.commands.process_setup import program
from bae.files import DiskFullError
from bae.signals import Stopped

if TYPE_CHECKING:
    import lightning as L

NOTICE = "\n{signal}: the run stops, with a checkpoint, at the end of this step; one more signal stops it at once\n"


def leave(cfg: DictConfig, trainer: "L.Trainer", stop: Stopped, agreed: bool) -> None:
    """Mark a run that a signal stops as killed, and find the words for it.

    Args:
        cfg: of the run.
        trainer: of the run.
        stop: gets the message; in ranks after the first, none and the exit code 0, because Lightning would take another
            one for a crash and kill the first rank.
        agreed: whether all ranks stop together. If not, the other ranks of this machine are killed, and the process
            ends here, because Lightning kills a process whose other ranks are dead.
    """
    if not trainer.is_global_zero:
        stop.code, stop.message = 0 if agreed else stop.code, ""
        return
    stop.message = f"stopped by {stop.name}; {_how_to_go_on(cfg)}"
    logger: Any = trainer.logger
    logger.finalize("killed")
    if stop.signum == signal.SIGUSR1 and agreed:
        from bae.callbacks.stopping import requeue_in_slurm

        failed = requeue_in_slurm(trainer)
        stop.message += f" ({failed})" if failed else ""
    if agreed or trainer.world_size == 1:
        return
    print(f"{program()}: {stop.message}", file=sys.stderr, flush=True)
    sweep.close_parent("KILLED")
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGKILL)
    os._exit(int(stop.code or 0))


def no_room(cfg: DictConfig, error: BaseException | None) -> cli.UserError | None:
    """Return what to tell the user if an error came from a full disk, or None."""
    while error is not None:
        if isinstance(error, DiskFullError):
            return cli.UserError(f"{error.strerror}, so the run has failed; make room: {_how_to_go_on(cfg)}")
        error = error.__cause__ or error.__context__
    return None


def _how_to_go_on(cfg: DictConfig) -> str:
    """Return in words which step is saved, and the command that goes on from it."""
    from bae.callbacks.checkpoints import saved_checkpoints, step_of

    folder = Path(cfg.output_folder)
    saved = saved_checkpoints(folder)
    if not saved:
        return "no step is saved, so start it anew"
    command = f"bae-{HydraConfig.get().job.config_name}"
    return f"step {step_of(saved[-1])} is saved; go on with: {command} {shlex.quote(f'resume={folder.absolute()}')}"
