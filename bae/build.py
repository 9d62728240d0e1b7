"""From a composed configuration to the parts that it names; what the entry points have in common."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from bae.blocks import Block
    from bae.models import Policy
    from bae.objectives import Objective
    from bae.rollout.pipeline import Pipeline
    from bae.tasks import Task


def make(node: DictConfig, **more: Any) -> Any:
    """Instantiate a node of the configuration; what it is given are plain dicts and lists."""
    from hydra.utils import instantiate

    return instantiate(node, _convert_="all", **more)


def plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def make_pipeline(cfg: DictConfig, policy: "Policy", task: "Task") -> "Pipeline":
    """Rollouts of `policy` on the problems of `task`, as the configuration of a run has them."""
    from bae.rollout.pipeline import Pipeline
    from bae.scoring import Scorer
    from bae.tokens import token_bytes

    blocks, objectives = make_format(cfg)
    return Pipeline(
        policy=policy,
        engine=make(cfg.rollout),
        scorer=Scorer(blocks, objectives, task.verifier, token_bytes(policy.tokenizer), cfg.objectives.malformed),
        task=task,
        system_prompt=cfg.objectives.system_prompt,
        examples=plain(cfg.objectives.examples),
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
    )


def make_format(cfg: DictConfig) -> "tuple[tuple[Block, ...], list[Objective]]":
    """The blocks of a completion and their objectives."""
    from bae.blocks import make_blocks

    objectives = [make(spec, name=name) for name, spec in cfg.objectives.rewards.items()]
    return make_blocks(plain(cfg.objectives.blocks)), [replace(o, reward=_undeferred(o.reward)) for o in objectives]


def _undeferred(function: Any) -> Any:
    """A plain partial for Hydra's own, which checks its target again at every call: 0.1 ms a completion."""
    return partial(function.func, *function.args, **function.keywords) if isinstance(function, partial) else function


def quieten() -> None:
    """Silence what libraries say of themselves; warnings that a user can act on stay."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # that it makes its tables
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")  # meant: no dropout
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # between lightning and torch
