"""`bae-train`: compose a configuration, build its parts, fit, say what came of it.

Heavy imports wait inside the functions: --help and a mistyped key answer at once, and the verifier's spawned
workers, which import the main module again, start light.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bae.commands import cli, schema
from bae.commands.build import CONFIG_FILE, RUN_FILE, make, make_pipeline, plain, quieten, run_folder, saved_config
from bae.commands.sweep import job_name

if TYPE_CHECKING:
    import lightning as L

    from bae.tasks.loader import PromptDataModule
    from bae.training.module import PolicyModule

PLACES = ("outputs", "output_folder", "logger", "name", "resume", "skip_finished")  # keys that change no result


def main() -> None:
    """Entry point of `bae-train`."""
    schema.register()
    cli.run(train, "train")


def train(cfg: DictConfig) -> None:
    """One run, from its start or from its newest checkpoint, and the table of what it changed."""
    run_id, checkpoint = None, None
    with cli.user_errors():
        if cfg.resume:
            folder, checkpoint = find_checkpoint(cfg)
            cfg = saved_config(folder, [o for o in HydraConfig.get().overrides.task if not o.startswith("resume=")])
            run_id = (folder / RUN_FILE).read_text()
        check(cfg)
        if cfg.skip_finished and not cfg.resume and (finished := find_finished(cfg)):
            print(f"done before: run {finished} in {cfg.logger.tracking_uri}; skip_finished=false does it again")
            return
        trainer, module, data = build(cfg, run_id)
    with ranks_of_one_job(cfg):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        report(cfg, trainer)


def check(cfg: DictConfig) -> None:
    """Refuse values that cannot work, before anything is built. Raises UserError."""
    unread = sorted({str(key) for key in cfg} - schema.TOP_LEVEL)
    unread += sorted(f"objectives.{key}" for key in cfg.objectives if key not in schema.OBJECTIVES)
    if unread:
        raise cli.UserError(f"{unread[0]}: nothing reads this key; remove it")
    for key in ("steps", "group_size", "prompts_per_step", "max_new_tokens", "temperature"):
        if cfg[key] <= 0:
            raise cli.UserError(f"{key}={cfg[key]}: must be above 0")
    if cfg.lr < 0:
        raise cli.UserError(f"lr={cfg.lr}: must not be negative")
    completions = cfg.prompts_per_step * cfg.group_size
    if cfg.group_size == 1:
        for key in ("first_block_baseline", "baseline"):
            if cfg[key]._target_ in ("bae.method.baselines.group_mean", "bae.method.baselines.outcome_conditioned"):
                raise cli.UserError(
                    f"group_size=1: {key} compares a completion with its group, so every advantage would be 0; "
                    "use group_size=2 or more"
                )
    if cfg.baseline.get("rollouts", 1) < 1:
        raise cli.UserError(f"baseline.rollouts={cfg.baseline.rollouts}: must be 1 or more")
    if cfg.baseline.get("all_action") and cfg.training.optimizer_steps > 1:
        raise cli.UserError(
            "baseline.all_action=true is for one optimiser step a batch: nothing clips it in later ones; set "
            "training.optimizer_steps=1 or baseline.all_action=false"
        )
    if cfg.baseline._target_ == "bae.method.baselines.RaoBlackwell":
        for part, function in cfg.normalisation.items():
            if function._target_ != "bae.method.normalisation.none":
                raise cli.UserError(
                    f"normalisation.{part}: with rao_blackwell or all_action, numbers get their advantages in the "
                    "training pass, which divides none; choose normalisation=none"
                )
    if completions % cfg.training.optimizer_steps:
        raise cli.UserError(
            f"training.optimizer_steps={cfg.training.optimizer_steps} does not divide the {completions} completions "
            "of a step (prompts_per_step * group_size); choose a divisor"
        )
    if not 0 < cfg.training.clip < 1:
        raise cli.UserError(f"training.clip={cfg.training.clip}: must lie between 0 and 1")
    if cfg.training.clip_high is not None and cfg.training.clip_high <= 0:
        raise cli.UserError(f"training.clip_high={cfg.training.clip_high}: must be above 0, or null")
    if cfg.training.importance_cap is not None and cfg.training.importance_cap <= 0:
        raise cli.UserError(f"training.importance_cap={cfg.training.importance_cap}: must be above 0, or null")
    if not 0 <= cfg.training.final_lr <= 1:
        raise cli.UserError(f"training.final_lr={cfg.training.final_lr}: a share of lr, from 0 to 1")
    if cfg.training.micro_batch_tokens < 1:
        raise cli.UserError(f"training.micro_batch_tokens={cfg.training.micro_batch_tokens}: must be 1 or more")


def build(cfg: DictConfig, run_id: str | None) -> "tuple[L.Trainer, PolicyModule, PromptDataModule]":
    """The parts of a run; each is named by `_target_` in conf/. run_id: the run to go on with, None for a new one."""
    import lightning as L

    from bae.tasks.loader import PromptDataModule
    from bae.training.module import PolicyModule

    quieten()
    L.seed_everything(cfg.seed, verbose=False)
    task, policy = make(cfg.task), make(cfg.model)
    pipeline = make_pipeline(cfg, policy, task)
    module = PolicyModule(
        policy,
        pipeline.scorer.blocks,
        make(cfg.optimizer),
        steps=cfg.steps,
        temperature=cfg.temperature,
        aggregation=make(cfg.aggregation),
        **plain(cfg.training),
    )
    data = PromptDataModule(task, cfg.steps, cfg.prompts_per_step, cfg.group_size, cfg.seed)
    callbacks = [make(part) for part in cfg.callbacks.values() if part]
    callbacks = [part(pipeline) if isinstance(part, partial) else part for part in callbacks]
    logger = make(cfg.logger, run_id=run_id, run_name=job_name(cfg.logger.run_name))
    trainer = L.Trainer(
        **make(cfg.strategy),
        max_epochs=1,  # an epoch is the whole run; its batches are the steps
        callbacks=callbacks,
        logger=logger,
        enable_model_summary=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,  # PromptLoader gives each rank its share
    )
    if trainer.is_global_zero:
        folder = Path(cfg.output_folder)
        if run_id is None:
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(cfg, folder / CONFIG_FILE)
            (folder / RUN_FILE).write_text(logger.run_id)
            logger.log_config(
                plain(cfg), {k: v for k, v in HydraConfig.get().runtime.choices.items() if not {"/", "@"} & set(k)}
            )
        size = str(sum(p.numel() for p in policy.model.parameters()))
        logger.set_tags({"output_folder": str(folder.absolute()), "settings": settings(cfg), "parameters": size,
                         "dtype": str(policy.model.dtype).removeprefix("torch.")})  # fmt: skip
    return trainer, module, data


@contextmanager
def ranks_of_one_job(cfg: DictConfig) -> Iterator[None]:
    """Further ranks train this job, and are gone after it.

    Lightning starts them with the command line of this process: in a sweep, each would start the whole sweep. And it
    leaves the process group and its environment behind, in which the next job would wait for ranks that have ended.
    """
    import torch

    command, environment = sys.argv, dict(os.environ)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        composed = HydraConfig.get()
        folders = [f"--config-dir={s.path}" for s in composed.runtime.config_sources if s.provider == "command-line"]
        sys.argv = [command[0], *folders, *composed.overrides.task, f"output_folder={cfg.output_folder}"]
    try:
        yield
    finally:
        sys.argv = command
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]


def settings(cfg: DictConfig) -> str:
    """A digest of all that decides what a run computes; where it writes is left out."""
    placeless = cfg.copy()
    placeless.outputs = placeless.output_folder = ""  # callbacks refer to them
    decisive = {key: value for key, value in plain(placeless).items() if key not in PLACES}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def find_finished(cfg: DictConfig) -> str | None:
    """The id of a finished run in MLflow with these settings."""
    from bae.report.tracking import search

    found = search(
        cfg.logger.tracking_uri,
        [cfg.logger.experiment],
        f"tags.settings = '{settings(cfg)}' and attributes.status = 'FINISHED'",
    )
    return found[0].info.run_id if found else None


def find_checkpoint(cfg: DictConfig) -> tuple[Path, Path]:
    """The output folder that `resume` means and its newest checkpoint. Raises UserError if there is none."""
    from bae.callbacks.checkpoints import saved_checkpoints

    folder = run_folder("resume", cfg.resume, cfg.logger.tracking_uri)
    checkpoints = saved_checkpoints(folder)
    if not checkpoints:
        raise cli.UserError(f"resume={cfg.resume}: {folder} holds no checkpoint yet; start the run anew")
    return folder, checkpoints[-1]


def report(cfg: DictConfig, trainer: "L.Trainer") -> None:
    """Print what the run changed on held-out problems, where it is, and the command that opens it."""
    from bae.report.tracking import absolute, history

    logger: Any = trainer.logger
    uri, run_id = absolute(cfg.logger.tracking_uri), logger.run_id
    if cfg.callbacks.held_out:
        print(f"\n{'held-out problems':<20}{'before':>10}{'after':>10}")
        for name in ("accuracy", "attempt_2/accuracy", "ece", "auroc", "brier", "confidence", "malformed"):
            values = history(uri, run_id, f"{cfg.callbacks.held_out.prefix}/{name}")
            if values and not all(map(math.isnan, values.values())):  # the format has such a thing
                print(f"{name:<20}{values[min(values)]:>10.3f}{values[max(values)]:>10.3f}")
    print(f"\npolicy   {Path(cfg.output_folder) / 'policy'}")
    print(f"run      {run_id} in {uri}, experiment {cfg.logger.experiment}")
    print(f"open it  {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {uri}")


if __name__ == "__main__":
    main()
