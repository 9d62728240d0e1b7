"""Types of the configuration's keys, so that `lr=abc` and `training.clp=1` are refused when it is composed.

Keys of parts that are named by `_target_` have the types of what they name: bae.commands.validate checks these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from bae.training.options import StepOptions, UpdateOptions

WITHOUT_EFFECT = (
    "outputs",
    "output_folder",
    "logger",
    "also_log",
    "name",
    "resume",
    "trust",
    "skip_finished",
    "stop_within",
    "preview",
    "optimize",
    "plan",
    "plan_card",
)
"""Keys that change no result."""


@dataclass
class RunSchema:
    """Give the keys that conf/train.yaml and conf/warmstart.yaml share their types. The files say what each means."""

    steps: int = MISSING
    seed: int = MISSING
    lr: float = MISSING
    prompts_per_step: int = MISSING
    max_prompt_tokens: int | None = None
    max_new_tokens: int = MISSING
    temperature: float = MISSING
    optimizer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    also_log: dict[str, Any] = field(default_factory=dict)
    name: str = MISSING
    outputs: str = MISSING
    output_folder: str = MISSING
    skip_finished: bool | None = None
    resume: str | None = None
    trust: list[str] = field(default_factory=list)
    stop_within: float = 600.0
    optimize: str | None = None


@dataclass
class TrainSchema(RunSchema):
    """Give the keys of conf/train.yaml their types. That file says what each key means."""

    group_size: int = MISSING
    preview: bool = False
    plan: bool = False
    plan_card: str | None = None
    training: UpdateOptions = MISSING
    first_block_baseline: dict[str, Any] = field(default_factory=dict)
    fallback_baseline: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    normalisation: dict[str, Any] = field(default_factory=dict)
    aggregation: dict[str, Any] = field(default_factory=dict)


@dataclass
class WarmstartSchema(RunSchema):
    """Give the keys of conf/warmstart.yaml their types. That file says what each key means."""

    training: StepOptions = MISSING
    demonstrations: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvaluateSchema:
    """Give the keys of conf/evaluate.yaml their types. That file says what each key means."""

    run: str | None = None
    completions: str | None = None
    policy: str = MISSING
    split: Any = MISSING
    prompts: int | None = None
    samples: int = MISSING
    temperature: float = MISSING
    max_new_tokens: int | None = None
    seed: int = MISSING
    device: str = MISSING
    trust: list[str] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    verifier: dict[str, Any] = field(default_factory=dict)
    unreadable: str = MISSING
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
    trust: list[str] = field(default_factory=list)
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
class ScoreSchema:
    """Give the keys of conf/score.yaml their types. That file says what each key means."""

    reference: str = MISSING
    question: str = MISSING
    tokenizer: str | None = None
    max_new_tokens: int = MISSING
    html: str | None = None
    task: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass
class SyncSchema:
    """Give the keys of conf/sync.yaml their types. That file says what each key means."""

    run: str | None = None
    outputs: str = MISSING
    tracking_uri: str | None = None


SCHEMAS = {
    "train": TrainSchema,
    "evaluate": EvaluateSchema,
    "fidelity": FidelitySchema,
    "report": ReportSchema,
    "score": ScoreSchema,
    "sync": SyncSchema,
    "warmstart": WarmstartSchema,
}
OBJECTIVES = frozenset(("system_prompt", "examples", "malformed", "blocks", "rewards"))


def of_run(saved: Mapping[str, Any]) -> type[RunSchema]:
    """Return the schema of a run's configuration: that of a warm start has demonstrations."""
    return WarmstartSchema if "demonstrations" in saved else TrainSchema


def _share(total: Any, parts: Any) -> int:
    """Divide, for sweeps at a fixed number of completions: `prompts_per_step: ${share:512,${group_size}}`."""
    return int(total) // int(parts)


def register() -> None:
    """Make the schemas known to Hydra, as `train_schema` and so on."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


# Not in `register`: launchers compose the configuration of a job in a process of its own, which only imports this.
OmegaConf.register_new_resolver("share", _share, replace=True)
