"""Choose what of a configuration MLflow shows as parameters: what people compare runs by. config.yaml has the rest."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from bae.commands.schema import WITHOUT_EFFECT

MORE = (
    "model.path",
    "model.dtype",
    "adapter.rank",
    "adapter.alpha",
    "adapter.targets",
    "objectives.malformed",
    "strategy.devices",
    "strategy.precision",
    "callbacks.entropy.target",
)
"""Keys below the top level that people compare runs by, beside those in `training`."""
PARTS = ("objectives.rewards", "baseline", "outcome", "normalisation", "aggregation", "optimizer")
"""Keys of parts whose numbers people compare runs by, such as a threshold."""
FIRST = ("model", "task", "method", "objectives", "baseline")
"""The groups that come first in the list."""
UNCOMPARED = ("callbacks", "logger")
"""Groups whose options decide no result."""


def parameters(cfg: DictConfig, choices: Mapping[str, str | None], overrides: Sequence[str]) -> dict[str, str]:
    """Return {parameter: value} of a run, each under the key by which the command line sets it.

    They are the options of groups, the single values of the top level and of `training`, the keys in MORE, numbers of
    PARTS, and whatever the user has overridden; None only then. What a `_target_` names has the key of the part itself.

    Args:
        cfg: of the run.
        choices: {config group: option}, as Hydra has them.
        overrides: of the command line of the run.
    """
    given = [(o.key_or_group, o.package) for o in OverridesParser.create().parse_overrides(list(overrides))]
    keys = [package or key for key, package in given]
    named = {group.partition("@")[2] or group: option for group, option in choices.items() if "/" not in group}
    shown = {g: option for g, option in named.items() if "." not in g and (g not in UNCOMPARED or g in keys)}
    found: dict[str, Any] = {key: shown[key] for key in sorted(shown, key=_rank)}
    found |= {str(k): value for k, value in cfg.items() if not OmegaConf.is_config(value) and k not in WITHOUT_EFFECT}
    found |= {key: value for key in ("training", *MORE) for key, value in _values(cfg, key)}
    found |= {key: value for part in PARTS for key, value in _values(cfg, part) if type(value) in (int, float)}
    overridden = {name: value for key in keys if key not in named for name, value in _values(cfg, key)}
    found |= {name: "null" if value is None else value for name, value in overridden.items()}
    return {name: str(value) for name, value in found.items() if value is not None}


def _rank(group: str) -> int:
    """Return the place of a group: MLflow shows parameters in the order in which they were logged."""
    return FIRST.index(group) if group in FIRST else len(FIRST)


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
