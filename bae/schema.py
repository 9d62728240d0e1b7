"""Types of the top-level keys of conf/train.yaml, so that `lr=abc` and `+typo=3` are refused when composing."""

from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


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
    model: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    name: str = MISSING
    outputs: str = MISSING
    output_folder: str = MISSING
    resume: str | None = None


TOP_LEVEL = frozenset(f.name for f in fields(TrainSchema))
OBJECTIVES = frozenset(("system_prompt", "malformed", "blocks", "rewards"))


def register() -> None:
    """Make the schema known to Hydra as `train_schema`."""
    ConfigStore.instance().store(name="train_schema", node=TrainSchema)
