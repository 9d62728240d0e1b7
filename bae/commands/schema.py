"""Types of the top-level keys of the entry points' yaml, so that `lr=abc` and `+typo=3` are refused when composing."""

from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


@dataclass
class TrainSchema:
    """What each key means is said in conf/train.yaml."""

    steps: int = MISSING
    seed: int = MISSING
    lr: float = MISSING
    group_size: int = MISSING
    prompts_per_step: int = MISSING
    max_new_tokens: int = MISSING
    temperature: float = MISSING
    training: dict[str, Any] = field(default_factory=dict)
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
    """What each key means is said in conf/evaluate.yaml."""

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
    """What each key means is said in conf/fidelity.yaml."""

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
    """What each key means is said in conf/report.yaml."""

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


TOP_LEVEL = frozenset(f.name for f in fields(TrainSchema))
OBJECTIVES = frozenset(("system_prompt", "examples", "malformed", "blocks", "rewards"))


def register() -> None:
    """Make the schemas known to Hydra, as `train_schema` and so on."""
    schemas = {"train": TrainSchema, "evaluate": EvaluateSchema, "fidelity": FidelitySchema, "report": ReportSchema}
    for name, schema in schemas.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    # For sweeps at a fixed number of completions: prompts_per_step: ${share:512,${group_size}}
    OmegaConf.register_new_resolver("share", lambda total, parts: int(total) // int(parts), replace=True)
