"""Refuse what cannot work, before anything heavy is done: sizes, devices, callbacks, and options that nothing reads."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bae.commands import schema
from bae.errors import UserError

MOST_SEED = 2**32 - 1
"""The largest seed that NumPy's global generator takes."""
WRITERS = {"rollouts": "completions", "advantages": "advantages", "demonstrations": "demonstrations"}
"""What the callbacks without which no step can be done write on the batch."""
SHARDED = "FullySharded"
"""The strategy that cuts weights up."""
UNFIT = ("DeepSpeed", "deepspeed", "FSDP", "fsdp", "ModelParallel")
"""The beginnings of the names of Lightning's strategies under which an update would go wrong."""
CONDITIONED = ("baseline", "outcome")
"""The groups that objectives with `given` alone read."""


def check_train(cfg: DictConfig) -> None:
    """Refuse sizes that bae-train cannot work with, before anything is built. Raises UserError.

    What a part needs of its own options, and of other parts, it checks itself when it is built.
    """
    check_run(cfg, schema.TrainSchema)
    _check_writers(cfg, "rollouts", "advantages")
    if cfg.group_size <= 0:
        raise UserError(f"group_size={cfg.group_size}: must be above 0")
    completions = cfg.prompts_per_step * cfg.group_size
    if cfg.training.optimizer_steps > 0 and completions % cfg.training.optimizer_steps:
        raise UserError(
            f"training.optimizer_steps={cfg.training.optimizer_steps} does not divide the {completions} completions "
            "of a step (prompts_per_step * group_size); choose a divisor"
        )
    _warn_of_warm_up(cfg, cfg.steps * cfg.training.optimizer_steps)
    _warn_of_unread(cfg)
    if cfg.training.kl_coef and cfg.training.kl_estimator == "k1":
        warnings.warn(
            "training.kl_estimator=k1: its gradient has the mean 0, so it holds the policy nowhere; use k2 or k3",
            stacklevel=2,
        )


def check_warmstart(cfg: DictConfig) -> None:
    """Refuse sizes that bae-warmstart cannot work with. Raises UserError."""
    check_run(cfg, schema.WarmstartSchema)
    _check_writers(cfg, "demonstrations")
    _warn_of_warm_up(cfg, cfg.steps)


def check_run(cfg: DictConfig, keys: type[schema.RunSchema]) -> None:
    """Refuse sizes that no command can train with, and keys that nothing reads. Raises UserError."""
    unread = sorted({str(key) for key in cfg} - {f.name for f in fields(keys)})
    unread += sorted(f"objectives.{key}" for key in cfg.objectives if key not in schema.OBJECTIVES)
    if unread:
        raise UserError(f"{unread[0]}: nothing reads this key; remove it")
    for key in ("lr", "temperature"):
        if not math.isfinite(cfg[key]):
            raise UserError(f"{key}={cfg[key]}: must be finite")
    for key in ("steps", "prompts_per_step", "max_new_tokens", "temperature"):
        if cfg[key] <= 0:
            raise UserError(f"{key}={cfg[key]}: must be above 0")
    if cfg.max_prompt_tokens is not None and cfg.max_prompt_tokens <= 0:
        raise UserError(f"max_prompt_tokens={cfg.max_prompt_tokens}: must be above 0, or null")
    for key in ("lr", "seed"):
        if cfg[key] < 0:
            raise UserError(f"{key}={cfg[key]}: must not be negative")
    if cfg.seed > MOST_SEED:
        raise UserError(f"seed={cfg.seed}: must be {MOST_SEED} at most")
    for key in ("optimize", "callbacks.checkpoints.best"):
        if (metric := OmegaConf.select(cfg, key)) is not None:
            _check_metric(cfg, key, str(metric))


def check_devices(strategy: Mapping[str, Any]) -> None:
    """Refuse numbers of devices that no machine has. Raises UserError."""
    devices = strategy.get("devices")
    if devices in (0, "0", []) or (isinstance(devices, int) and devices < -1):
        raise UserError(f"strategy.devices={devices}: must be 1 or more, or auto")


def check_strategy(strategy: Mapping[str, Any]) -> None:
    """Refuse devices that this machine does not have. Raises UserError."""
    import torch

    devices, accelerator = strategy.get("devices"), strategy.get("accelerator")
    if accelerator not in ("gpu", "cuda"):
        return
    count = torch.cuda.device_count() or int(torch.backends.mps.is_available())
    if not count:
        raise UserError(f"strategy.accelerator={accelerator}: there is no GPU here; use strategy=cpu")
    if isinstance(devices, int) and devices > count:
        raise UserError(f"strategy.devices={devices}: there are {count} GPUs here; use {count} or fewer")


def check_sharded(config: Mapping[str, Any]) -> None:
    """Refuse strategies that cannot train this way, and what does not work with shards of weights. Raises UserError.

    config: of a run.
    """
    name = strategy_class(config["strategy"])
    if name.startswith(UNFIT):
        raise UserError(
            f"strategy.strategy={name}: an update takes several backward passes and clips the gradients itself, which "
            "this strategy does not allow; strategy=fsdp shards as much"
        )
    if name != SHARDED:
        return
    if config["optimizer"]["_target_"] == "bae.training.optimizers.stochastic_adamw":
        raise UserError(
            "optimizer: the state of this one cannot be saved in shards; with strategy=fsdp use optimizer=adamw_kahan "
            "or optimizer=adamw"
        )
    if config["model"].get("compile"):
        raise UserError("model.compile=true: shards are not compiled; with strategy=fsdp set model.compile=false")
    if config.get("adapter"):
        raise UserError("adapter: strategy=fsdp cuts weights up, which adapters are not made for; use strategy=ddp")


def strategy_class(strategy: Mapping[str, Any]) -> str:
    """Return the name of the strategy's class, or by which Lightning knows it; empty for one process."""
    named = strategy.get("strategy") or ""
    return str(named if isinstance(named, str) else named.get("_target_", "")).rpartition(".")[2]


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have. Raises UserError. device: auto, or a name of torch."""
    import torch

    if device == "auto":
        return
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device}: no such device; use auto, cpu, cuda or cuda:1") from error
    count = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise UserError(f"device={device}: {f'there are {count} GPUs' if count else 'there is no GPU'} here; use auto")


def _check_metric(cfg: DictConfig, key: str, metric: str) -> None:
    """Refuse a metric that this run does not measure, or of which it is not known what is good. Raises UserError."""
    from bae.evaluation.direction import low_is_good

    if not cfg.callbacks.get("held_out"):
        raise UserError(f"{key}={metric}: nothing measures it, because callbacks.held_out is null")
    try:
        low_is_good(key, metric, cfg.callbacks.held_out.prefix)
    except ValueError as error:
        raise UserError(str(error)) from error
    family, _, objective = metric.partition("/")[2].rpartition("/")
    if family in ("reward", "malformed") and objective not in cfg.objectives.rewards:
        raise UserError(f"{key}={metric}: no such objective; there are {', '.join(map(str, cfg.objectives.rewards))}")


def _check_writers(cfg: DictConfig, *needed: str) -> None:
    """Refuse a run without a callback that a step cannot do without. Raises UserError."""
    for name in needed:
        if not cfg.callbacks.get(name):
            raise UserError(
                f"callbacks.{name}=null: a step needs it, because it writes {WRITERS[name]}; leave it as it is"
            )


def _warn_of_warm_up(cfg: DictConfig, steps: int) -> None:
    """Warn if the learning rate never gets to `lr`. steps: optimiser steps of the run."""
    if cfg.training.warmup_steps > steps:
        warnings.warn(
            f"training.warmup_steps={cfg.training.warmup_steps} is more than the {steps} optimiser steps of this run, "
            "so the learning rate never gets to lr",
            stacklevel=2,
        )


def _warn_of_unread(cfg: DictConfig) -> None:
    """Warn if a baseline or an outcome was chosen on the command line, and no objective reads it."""
    if any(objective.get("given") for objective in cfg.objectives.rewards.values() if objective):
        return
    for override in HydraConfig.get().overrides.task if HydraConfig.initialized() else ():
        if override.partition("=")[0].lstrip("+").partition(".")[0] in CONDITIONED:
            warnings.warn(
                f"{override}: nothing reads it, because no objective of objectives.rewards has `given`; the baseline "
                "of the first block is baseline@first_block_baseline",
                stacklevel=2,
            )
