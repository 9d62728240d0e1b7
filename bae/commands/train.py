"""`bae-train`: compose a configuration, build its parts, fit, and say what came of it.

Heavy imports wait inside the functions. So --help and a mistyped key answer at once, and the spawned workers of the
verifier, which import the main module again, start light.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bae.commands import cli
from bae.commands.build import CONFIG_FILE, make, make_run, plain
from bae.commands.checks import check_train
from bae.commands.parameters import parameters
from bae.commands.plan import plan
from bae.commands.preview import preview
from bae.commands.process_setup import program
from bae.commands.resuming import AUTO, begin, settings
from bae.commands.stopping import NOTICE, leave, no_room
from bae.commands.sweep import job_name
from bae.files import write_atomically
from bae.signals import Stopped, StopSignals

if TYPE_CHECKING:
    import lightning as L
    from hydra.conf import HydraConf

    from bae.report.run_page import Change
    from bae.rollout.pipeline import Pipeline
    from bae.training.causal_lm import CausalLM
    from bae.training.module import Trains
    from bae.training.update import Update


def main() -> None:
    """Run `bae-train`."""
    cli.run(train, "train")


def train(cfg: DictConfig) -> Path | None:
    """Train one run by blockwise advantages, and return its folder; None if it was done before.

    With plan=true, print what it would need instead; with preview=true, the prompts that it would begin with.
    """
    if cfg.plan:
        plan(cfg, check_train)
        return None
    if cfg.preview:
        preview(cfg, check_train, blockwise_update)
        return None
    return fit(cfg, check_train, blockwise_update)


def blockwise_update(cfg: DictConfig, pipeline: "Pipeline") -> "Update":
    """Make the update that the configuration describes."""
    from bae.training.options import UpdateOptions
    from bae.training.update import Update

    options = UpdateOptions(**plain(cfg.training))
    return Update(pipeline.policy.model, pipeline.scorer.blocks, cfg.temperature, options, make(cfg.aggregation))


def fit(
    cfg: DictConfig, check: Callable[[DictConfig], None], make_update: "Callable[[DictConfig, Pipeline], Trains]"
) -> Path | None:
    """Train one run, from its start or from its newest checkpoint, and print the table of what it changed.

    Args:
        cfg: of the command.
        check: refuses values that cannot work; raises UserError.
        make_update: makes what a training step does, for the policy of a pipeline.

    Returns:
        The output folder of the run; None if the run was done before, or in a process that is not the first.
    """
    from lightning.pytorch.callbacks import LambdaCallback

    from bae.callbacks.malformed import MalformedStart
    from bae.callbacks.stopping import StopAtStepEnd

    with StopSignals() as signals, ExitStack() as held:
        what = f"resume={cfg.resume}" if cfg.resume else cfg.name  # a resumed run has another name than this call
        print(f"{program()} {what}: loading the model, the task and MLflow", flush=True)
        with cli.user_errors():
            beginning = begin(cfg, check, held)
            if beginning is None:
                return None
            cfg, run_id, stopper = beginning.cfg, beginning.run_id, StopAtStepEnd(signals)
            last = LambdaCallback(on_train_end=lambda trainer, _: describe(cfg, trainer))  # before the run is closed
            name = job_name(cfg.logger.run_name)
            trainer, module, data = make_run(cfg, make_update, run_id, name, [MalformedStart(), stopper, last])
        if trainer.is_global_zero:
            signals.notice, signals.last_words = NOTICE, partial(leave, cfg, trainer, agreed=False)
        signals.within = cfg.stop_within
        try:
            if trainer.is_global_zero:
                record(cfg, trainer, module.model, is_new=beginning.checkpoint is None)
            with ranks_of_one_job(cfg, beginning.checkpoint):
                trainer.fit(module, data, ckpt_path=beginning.checkpoint, weights_only=True)
        except Stopped as stop:
            leave(cfg, trainer, stop, stopper.agreed)
            raise
        except Exception as error:
            raise (no_room(cfg, error) or error) from None
        signals.deferred = False
        if not trainer.is_global_zero:
            return None
        report(cfg, trainer)
        return Path(cfg.output_folder)


def record(cfg: DictConfig, trainer: "L.Trainer", model: "CausalLM", is_new: bool) -> None:
    """Write down what is run: in the output folder and in MLflow."""
    from bae.report.tracking import source

    folder, logger = Path(cfg.output_folder), cast(Any, trainer.logger)
    if is_new:
        write_atomically(folder / CONFIG_FILE, OmegaConf.to_yaml(cfg))
        logger.begin()
        composed = HydraConfig.get()
        given = composed.overrides.task
        logger.log_config(plain(cfg), parameters(cfg, composed.runtime.choices, given))
        logger.set_tags(source(shlex.join([f"bae-{composed.job.config_name}", *folder_arguments(composed), *given])))
    else:
        logger.set_status("RUNNING")  # it may be FINISHED or FAILED
    logger.set_tags(
        {
            "output_folder": str(folder.absolute()),
            "settings": settings(cfg),
            "parameters": str(sum(p.numel() for p in model.parameters())),
            "trained_parameters": str(sum(p.numel() for p in model.parameters() if p.requires_grad)),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
    )
    describe(cfg, trainer)


def describe(cfg: DictConfig, trainer: "L.Trainer") -> None:
    """Write what is known of the run so far on its page in MLflow."""
    from bae.callbacks.best import best_of
    from bae.report.run_page import description
    from bae.report.tracking import NOTE

    if trainer.is_global_zero:
        logger: Any = trainer.logger
        held_out, evaluation = cfg.callbacks.get("held_out"), cfg.callbacks.get("evaluation")
        prefix, splits = held_out and held_out.prefix, evaluation.splits if evaluation else ()
        best = best_of(Path(cfg.output_folder))
        tags = {"best": str(best)} if best else {}
        logger.set_tags({NOTE: description(logger.log, cfg.steps, prefix, list(splits)), **tags})


def folder_arguments(composed: "HydraConf") -> list[str]:
    """Return the arguments by which the user added folders of configuration."""
    return [f"--config-dir={s.path}" for s in composed.runtime.config_sources if s.provider == "command-line"]


@contextmanager
def ranks_of_one_job(cfg: DictConfig, checkpoint: Path | None) -> Iterator[None]:
    """Let further ranks train this job, and be gone after it.

    Lightning starts them with the command line of this process: in a sweep, each would start the whole sweep. And it
    leaves the process group and its environment behind, in which the next job would wait for ranks that have ended.

    Args:
        cfg: of the run.
        checkpoint: that it goes on with; None for a new run. With resume=auto, further ranks are told which it is.
    """
    import torch

    command, environment = sys.argv, dict(os.environ)
    composed = HydraConfig.get()
    own = list(composed.overrides.task)
    is_auto = f"resume={AUTO}" in own
    if is_auto:
        own = [f"resume={cfg.output_folder}"] if checkpoint else [o for o in own if o != f"resume={AUTO}"]
    if is_auto or composed.mode == RunMode.MULTIRUN:
        sys.argv = [command[0], *folder_arguments(composed), *own, f"output_folder={cli.quoted(cfg.output_folder)}"]
    try:
        yield
    finally:
        sys.argv = command
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]


def report(cfg: DictConfig, trainer: "L.Trainer") -> None:
    """Print what the run changed on held-out problems, where it is, and the command that opens it."""
    from bae.callbacks.best import FOLDER, best_of
    from bae.report.run_page import changes

    logger: Any = trainer.logger
    if cfg.callbacks.held_out:
        found = changes(logger.log, cfg.callbacks.held_out.prefix, cfg.steps)
        print("\n".join(["", *table_of(found, cfg.steps)]))
    folder = Path(cfg.output_folder)
    print(f"\npolicy   {folder / 'policy'}")
    if best := best_of(folder):
        print(f"best     {folder / FOLDER}: {best}")
    if cfg.callbacks.get("pictures"):
        print(f"pictures {folder / 'pictures'}: {' '.join(sorted(p.name for p in folder.glob('pictures/*.png')))}")
    print(f"run      {logger.place}, experiment {cfg.logger.experiment}")
    if not logger.uri.startswith("http"):
        print(f"open it  {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {logger.uri}")
    print(f"page     {logger.page}")


def table_of(found: "list[Change]", steps: int) -> list[str]:
    """Return what a run changed as a table for the terminal."""
    if not found:
        return [f"held-out problems: the log of this run has none of step 0, and none of step {steps}"]
    from bae.report.run_page import number

    rows = [f"{name:<20}{number(before):>10}{number(after):>10}" for name, before, after in found]
    return [f"{'held-out problems':<20}{'before':>10}{'after':>10}", *rows]


if __name__ == "__main__":
    main()
