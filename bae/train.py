"""`bae-train`: compose a configuration, build its parts, fit, say what came of it.

Heavy imports wait inside the functions: --help and a mistyped key answer at once, and the verifier's spawned
workers, which import the main module again, start light.
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bae import cli, schema

if TYPE_CHECKING:
    import lightning as L

    from bae.datamodule import PromptDataModule
    from bae.policy import PolicyModule

CONFIG_FILE = "config.yaml"  # in the output folder: the configuration, as composed
RUN_FILE = "run_id"  # in the output folder: the run in MLflow


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
            cfg = saved_config(folder)
            run_id = (folder / RUN_FILE).read_text()
        check(cfg)
        trainer, module, data = build(cfg, run_id)
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
            if cfg[key]._target_ in ("bae.baselines.group_mean", "bae.baselines.outcome_conditioned"):
                raise cli.UserError(
                    f"group_size=1: {key} compares a completion with its group, so every advantage would be 0; "
                    "use group_size=2 or more"
                )
    if completions % cfg.training.optimizer_steps:
        raise cli.UserError(
            f"training.optimizer_steps={cfg.training.optimizer_steps} does not divide the {completions} completions "
            "of a step (prompts_per_step * group_size); choose a divisor"
        )
    if not 0 < cfg.training.clip < 1:
        raise cli.UserError(f"training.clip={cfg.training.clip}: must lie between 0 and 1")
    if cfg.training.micro_batch_size < 1:
        raise cli.UserError(f"training.micro_batch_size={cfg.training.micro_batch_size}: must be 1 or more")


def build(cfg: DictConfig, run_id: str | None) -> "tuple[L.Trainer, PolicyModule, PromptDataModule]":
    """The parts of a run; each is named by `_target_` in conf/. run_id: the run to go on with, None for a new one."""
    import lightning as L

    from bae.blocks import make_blocks
    from bae.datamodule import PromptDataModule
    from bae.policy import PolicyModule
    from bae.rollout.pipeline import Pipeline
    from bae.scoring import Scorer
    from bae.tokens import token_bytes

    quieten()
    L.seed_everything(cfg.seed, verbose=False)
    blocks = make_blocks(plain(cfg.objectives.blocks))
    objectives = [make(spec, name=name) for name, spec in cfg.objectives.rewards.items()]
    task, policy = make(cfg.task), make(cfg.model)
    pipeline = Pipeline(
        policy=policy,
        engine=make(cfg.rollout),
        scorer=Scorer(blocks, objectives, task.verifier, token_bytes(policy.tokenizer), cfg.objectives.malformed),
        task=task,
        system_prompt=cfg.objectives.system_prompt,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
    )
    module = PolicyModule(policy, blocks, make(cfg.optimizer), temperature=cfg.temperature, **plain(cfg.training))
    data = PromptDataModule(task, cfg.steps, cfg.prompts_per_step, cfg.group_size, cfg.seed)
    callbacks = [make(part) for part in cfg.callbacks.values() if part]
    callbacks = [part(pipeline) if isinstance(part, partial) else part for part in callbacks]
    logger = make(cfg.logger, run_id=run_id)
    trainer = L.Trainer(
        **make(cfg.strategy),
        max_epochs=1,  # an epoch is the whole run; its batches are the steps
        callbacks=callbacks,
        logger=logger,
        enable_model_summary=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,  # PromptLoader gives each rank its share
    )
    if run_id is None and trainer.is_global_zero:
        folder = Path(cfg.output_folder)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, folder / CONFIG_FILE)
        (folder / RUN_FILE).write_text(logger.run_id)
        logger.log_config(plain(cfg), {k: v for k, v in HydraConfig.get().runtime.choices.items() if "/" not in k})
        logger.set_tags({"output_folder": str(folder.absolute())})
    return trainer, module, data


def quieten() -> None:
    """Silence what libraries say of themselves; warnings that a user can act on stay."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")  # meant: no dropout
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # between lightning and torch


def make(node: DictConfig, **more: Any) -> Any:
    """Instantiate a node of the configuration; what it is given are plain dicts and lists."""
    from hydra.utils import instantiate

    return instantiate(node, _convert_="all", **more)


def plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def find_checkpoint(cfg: DictConfig) -> tuple[Path, Path]:
    """The output folder that `resume` means and its newest checkpoint. Raises UserError if there is none."""
    from bae.callbacks.checkpoints import saved_checkpoints
    from bae.tracking import find_run_folder

    folder = Path(cfg.resume)
    if not folder.is_dir():
        folder = find_run_folder(cfg.logger.tracking_uri, cfg.resume)
    if not (folder / RUN_FILE).is_file():
        raise cli.UserError(f"resume={cfg.resume}: {folder} is not the output folder of a run; it has no {RUN_FILE}")
    checkpoints = saved_checkpoints(folder)
    if not checkpoints:
        raise cli.UserError(f"resume={cfg.resume}: {folder} holds no checkpoint yet; start the run anew")
    return folder, checkpoints[-1]


def saved_config(folder: Path) -> DictConfig:
    """The configuration of the run in `folder`, with the values that were changed on this command line."""
    saved = OmegaConf.load(folder / CONFIG_FILE)
    OmegaConf.set_struct(saved, True)
    overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith("resume=")]
    for override in overrides:
        if OmegaConf.is_dict(OmegaConf.select(saved, override.partition("=")[0])):
            raise cli.UserError(f"{override}: a resumed run keeps its parts; only values can change, as in steps=300")
    merged = OmegaConf.merge(saved, OmegaConf.from_dotlist(overrides), {"output_folder": str(folder)})
    assert isinstance(merged, DictConfig)
    return merged


def report(cfg: DictConfig, trainer: "L.Trainer") -> None:
    """Print what the run changed on held-out problems, where it is, and the command that opens it."""
    from bae.tracking import history

    logger: Any = trainer.logger
    uri, run_id = cfg.logger.tracking_uri, logger.run_id
    if cfg.callbacks.held_out:
        print(f"\n{'held-out problems':<20}{'before':>10}{'after':>10}")
        for name in ("accuracy", "ece", "auroc", "brier", "confidence", "malformed"):
            values = history(uri, run_id, f"{cfg.callbacks.held_out.prefix}/{name}")
            print(f"{name:<20}{values[min(values)]:>10.3f}{values[max(values)]:>10.3f}")
    print(f"\npolicy   {Path(cfg.output_folder) / 'policy'}")
    print(f"run      {run_id} in {uri}, experiment {cfg.logger.experiment}")
    print(f"open it  {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {uri}")


if __name__ == "__main__":
    main()
