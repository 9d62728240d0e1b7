"""Refuse what cannot work, before anything heavy is done: sizes, devices, callbacks, and options that nothing reads."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bae.commands import schema
from bae.errors import UserError

MOST_SEED = 2**32 - 1
"""The largest seed that NumPy's global generator takes."""
WRITERS = {"rollouts": "completions", "advantages": "advantages", "demonstrations": "demonstrations"}
"""What the callbacks without which no step can be done write on the batch."""
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
    for key in ("lr", "seed"):
        if cfg[key] < 0:
            raise UserError(f"{key}={cfg[key]}: must not be negative")
    if cfg.seed > MOST_SEED:
        raise UserError(f"seed={cfg.seed}: must be {MOST_SEED} at most")


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
