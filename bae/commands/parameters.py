"""Choose what of a configuration MLflow shows as parameters: what people compare runs by. config.yaml has the rest."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from bae.commands.resuming import PLACES

MORE = (
    "model.path",
    "model.dtype",
    "objectives.malformed",
    "strategy.devices",
    "strategy.precision",
    "callbacks.entropy.target",
)
"""Keys below the top level that people compare runs by, beside those in `training`."""
UNCOMPARED = ("callbacks", "logger")
"""Groups whose options decide no result."""


def parameters(cfg: DictConfig, choices: Mapping[str, str | None], overrides: Sequence[str]) -> dict[str, str]:
    """Return {parameter: value} of a run, each under the key by which the command line sets it.

    They are the options of groups, the single values of the top level and of `training`, the keys in MORE, and whatever
    the user has overridden. None is left out. What a `_target_` names has the key of the part itself.

    Args:
        cfg: of the run.
        choices: {config group: option}, as Hydra has them.
        overrides: of the command line of the run.
    """
    given = [(o.key_or_group, o.package) for o in OverridesParser.create().parse_overrides(list(overrides))]
    keys = [package or key for key, package in given]
    compared = {key: value for key, value in cfg.items() if not OmegaConf.is_config(value) and key not in PLACES}
    found: dict[str, Any] = {str(key): value for key, value in compared.items()}
    found |= {key: value for key in ("training", *MORE) for key, value in _values(cfg, key)}
    named = {group.partition("@")[2] or group: option for group, option in choices.items() if "/" not in group}
    found |= {
        group: option
        for group, option in named.items()
        if "." not in group and (group not in UNCOMPARED or group in keys)
    }
    found |= {name: value for key in keys if key not in named for name, value in _values(cfg, key)}
    return {name: str(value) for name, value in found.items() if value is not None}


def _values(cfg: DictConfig, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of every single value at a key and below it; nothing if the key is not there."""
    value = OmegaConf.select(cfg, key)
    if OmegaConf.is_dict(value):
        for below in value:
            yield from _values(cfg, f"{key}.{below}")
        return
    part, _, last = key.rpartition(".")
    if last == "_target_":
        yield part, value
    elif not last.startswith("_"):
        yield key, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
