"""From a composed configuration to the parts that it names; what the entry points have in common."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from bae.commands import cli

if TYPE_CHECKING:
    from bae.objectives import Objective
    from bae.rollout.pipeline import Pipeline
    from bae.tasks import Task
    from bae.text.blocks import Block
    from bae.training.policy import Policy


CONFIG_FILE = "config.yaml"  # in the output folder: the configuration, as composed
RUN_FILE = "run_id"  # in the output folder: the run in MLflow


def make(node: DictConfig, **more: Any) -> Any:
    """Instantiate a node of the configuration; what it is given are plain dicts and lists."""
    from hydra.utils import instantiate

    return instantiate(node, _convert_="all", **more)


def plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def make_pipeline(cfg: DictConfig, policy: "Policy", task: "Task") -> "Pipeline":
    """Rollouts of `policy` on the problems of `task`, as the configuration of a run has them."""
    from bae.objectives.scoring import Scorer
    from bae.rollout.pipeline import Pipeline
    from bae.text.tokens import token_bytes

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
    from bae.text.blocks import make_blocks

    objectives = [make(spec, name=name) for name, spec in cfg.objectives.rewards.items()]
    return make_blocks(plain(cfg.objectives.blocks)), [replace(o, reward=_undeferred(o.reward)) for o in objectives]


def _undeferred(function: Any) -> Any:
    """A plain partial for Hydra's own, which checks its target again at every call: 0.1 ms a completion."""
    return partial(function.func, *function.args, **function.keywords) if isinstance(function, partial) else function


def run_folder(key: str, value: str, tracking_uri: str) -> Path:
    """The output folder of a run, named by it or by its MLflow run id. Raises UserError if `value` is neither; `key`
    is what the user wrote it as."""
    from bae.report.tracking import find_run_folder

    folder = Path(value) if Path(value).is_dir() else find_run_folder(key, value, tracking_uri)
    if not (folder / RUN_FILE).is_file():
        raise cli.UserError(f"{key}={value}: {folder} is not the output folder of a run; it has no {RUN_FILE}")
    return folder


def saved_config(folder: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of the run in `folder`, with the values that were changed on this command line."""
    saved = OmegaConf.load(folder / CONFIG_FILE)
    OmegaConf.set_struct(saved, True)
    for override in overrides:
        if OmegaConf.is_dict(OmegaConf.select(saved, override.partition("=")[0])):
            raise cli.UserError(f"{override}: a resumed run keeps its parts; only values can change, as in steps=300")
    merged = OmegaConf.merge(saved, OmegaConf.from_dotlist(list(overrides)), {"output_folder": str(folder)})
    assert isinstance(merged, DictConfig)
    return merged


def trained(cfg: DictConfig) -> "tuple[Path, DictConfig, Pipeline]":
    """The output folder of the run that `cfg.run` names, its configuration, and its policy at work on `cfg.task`, by
    default its own, with `cfg.temperature` and `cfg.max_new_tokens`. Raises UserError if there is no such policy."""
    import torch

    from bae.training.policy import load_pretrained

    quieten()
    folder = run_folder("run", cfg.run, cfg.logger.tracking_uri)
    before = saved_config(folder)
    if not (folder / "policy").is_dir():
        raise cli.UserError(f"run={cfg.run}: {folder} has no policy yet; finish it with: bae-train resume={folder}")
    policy = load_pretrained(
        str(folder / "policy"),
        before.model.dtype,
        before.model.prompt_template,
        before.model.get("trust_remote_code", False),
    )
    policy.model.to(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    pipeline = make_pipeline(before, policy, make(cfg.task or before.task))
    limit = cfg.max_new_tokens or before.max_new_tokens
    return folder, before, replace(pipeline, temperature=cfg.temperature, max_new_tokens=limit)


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
