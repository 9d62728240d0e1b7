"""Types of the configuration's keys, so that `lr=abc` and `training.clp=1` are refused when it is composed.

Keys of parts that are named by `_target_` have the types of what they name: bae.commands.validate checks these.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from bae.training.options import UpdateOptions


@dataclass
class TrainSchema:
    """Give the keys of conf/train.yaml their types. That file says what each key means."""

    steps: int = MISSING
    seed: int = MISSING
    lr: float = MISSING
    group_size: int = MISSING
    prompts_per_step: int = MISSING
    max_new_tokens: int = MISSING
    temperature: float = MISSING
    training: UpdateOptions = MISSING
    optimizer: dict[str, Any] = field(default_factory=dict)
    first_block_baseline: dict[str, Any] = field(default_factory=dict)
    fallback_baseline: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    normalisation: dict[str, Any] = field(default_factory=dict)
    aggregation: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    name: str = MISSING
    outputs: str = MISSING
    output_folder: str = MISSING
    skip_finished: bool = False
    resume: str | None = None


@dataclass
class EvaluateSchema:
    """Give the keys of conf/evaluate.yaml their types. That file says what each key means."""

    run: str | None = None
    completions: str | None = None
    split: Any = MISSING
    prompts: int | None = None
    samples: int = MISSING
    temperature: float = MISSING
    max_new_tokens: int | None = None
    seed: int = MISSING
    device: str = MISSING
    columns: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    verifier: dict[str, Any] = field(default_factory=dict)
    resamples: int = MISSING
    task: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    name: str = MISSING
    outputs: str = MISSING


@dataclass
class FidelitySchema:
    """Give the keys of conf/fidelity.yaml their types. That file says what each key means."""

    run: str | None = None
    split: str = MISSING
    prompts: int = MISSING
    group_size: Any = MISSING
    rollouts: int = MISSING
    baselines: list[str] = MISSING
    reference: str = MISSING
    nested: int = MISSING
    gradient: int = MISSING
    temperature: float = MISSING
    max_new_tokens: int | None = None
    micro_batch_tokens: int = MISSING
    seed: int = MISSING
    device: str = MISSING
    resamples: int = MISSING
    fallback_baseline: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    name: str = MISSING
    outputs: str = MISSING


@dataclass
class ReportSchema:
    """Give the keys of conf/report.yaml their types. That file says what each key means."""

    experiments: list[str] | None = None
    runs: list[str] | None = None
    models: list[str] | None = None
    resamples: int = MISSING
    table: str | None = None
    figure: str | None = None
    logger: dict[str, Any] = field(default_factory=dict)
    name: str = MISSING
    outputs: str = MISSING
    folder: str = MISSING


@dataclass
class WarmstartSchema:
    """Give the keys of conf/warmstart.yaml their types. That file says what each key means."""

    steps: int = MISSING
    batch_size: int = MISSING
    micro_batch_size: int = MISSING
    lr: float = MISSING
    seed: int = MISSING
    output: str = MISSING
    task: dict[str, Any] = field(default_factory=dict)
    demonstrations: dict[str, Any] = field(default_factory=dict)


SCHEMAS = {
    "train": TrainSchema,
    "evaluate": EvaluateSchema,
    "fidelity": FidelitySchema,
    "report": ReportSchema,
    "warmstart": WarmstartSchema,
}
TOP_LEVEL = frozenset(f.name for f in fields(TrainSchema))
OBJECTIVES = frozenset(("system_prompt", "examples", "malformed", "blocks", "rewards"))


def _share(total: Any, parts: Any) -> int:
    """Divide, for sweeps at a fixed number of completions: `prompts_per_step: ${share:512,${group_size}}`."""
    return int(total) // int(parts)


def register() -> None:
    """Make the schemas known to Hydra, as `train_schema` and so on, and the resolver `share`."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    OmegaConf.register_new_resolver("share", _share, replace=True)
