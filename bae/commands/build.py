"""From a composed configuration to the parts that it names. The entry points share this."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf

from bae.commands import cli, schema, validate
from bae.commands.checks import check_device, check_devices, check_sharded, check_strategy
from bae.commands.trust import check_trusted
from bae.report.run_log import LOG, RUN_FILE

if TYPE_CHECKING:
    import lightning as L

    from bae.objectives import Objective
    from bae.rollout.pipeline import Pipeline
    from bae.tasks import Task
    from bae.tasks.loader import PromptDataModule
    from bae.text.blocks import Block
    from bae.training.module import PolicyModule, Trains
    from bae.training.policy import Policy

LATEST = "latest"
"""The value of `run` and `resume` that means the newest run."""
CONFIG_FILE = "config.yaml"  # in the output folder: the configuration, as composed


def make(node: DictConfig, **more: Any) -> Any:
    """Instantiate a node of the configuration. What it is given are plain dicts and lists."""
    from hydra.utils import instantiate

    return instantiate(node, _convert_="all", **more)


def plain(node: DictConfig | ListConfig) -> Any:
    """Return a node as plain dicts and lists, with all references resolved."""
    return OmegaConf.to_container(node, resolve=True)


def make_run(
    cfg: DictConfig,
    make_update: "Callable[[DictConfig, Pipeline], Trains]",
    run_id: str | None,
    run_name: str,
    more_callbacks: "Sequence[L.Callback]" = (),
) -> "tuple[L.Trainer, PolicyModule, PromptDataModule]":
    """Make the parts of a training run.

    Args:
        cfg: of bae-train or bae-warmstart.
        make_update: makes what a training step does, for the policy of a pipeline.
        run_id: the run in MLflow to go on with; None for a new one, and for one that MLflow has not made yet.
        run_name: its name there.
        more_callbacks: beside those of the configuration.
    """
    import lightning as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from bae.tasks.loader import PromptDataModule, longest
    from bae.training.module import PolicyModule

    quieten()
    L.seed_everything(cfg.seed, verbose=False)
    check_strategy(check_config(cfg)["strategy"])
    optimizer = make_optimizer(cfg)
    task, policy = make(cfg.task), make(cfg.model)
    if cfg.adapter:
        policy = policy.with_adapter(make(cfg.adapter))
    pipeline = make_pipeline(cfg, policy, task)
    pipeline.check_room(longest(pipeline.task, "train"))
    module = PolicyModule(policy, make_update(cfg, pipeline), optimizer, cfg.steps)
    data = PromptDataModule(pipeline.task, cfg.steps, cfg.prompts_per_step, cfg.get("group_size", 1), cfg.seed)
    callbacks = [make(part) for part in cfg.callbacks.values() if part]
    callbacks = [part(pipeline) if isinstance(part, partial) else part for part in callbacks]
    logger = make(cfg.logger, folder=cfg.output_folder, run_id=run_id, run_name=run_name)
    others = make_other_loggers(cfg)
    try:
        trainer = L.Trainer(
            **make(cfg.strategy),
            max_epochs=1,  # an epoch is the whole run; its batches are the steps
            callbacks=[*callbacks, *more_callbacks],
            logger=[logger, *others],
            enable_model_summary=False,
            log_every_n_steps=1,
            use_distributed_sampler=False,  # PromptLoader gives each rank its share
        )
    except (MisconfigurationException, ModuleNotFoundError) as error:
        raise cli.UserError(f"strategy: {' '.join(str(error).split())}") from error
    return trainer, module, data


def make_other_loggers(cfg: DictConfig) -> list[Any]:
    """Make the loggers beside MLflow. Raises UserError if the package of one is not installed."""
    found = []
    for name, spec in cfg.also_log.items():
        try:
            found.append(make(spec))
        except Exception as error:
            if isinstance(error.__cause__, ImportError):
                raise cli.UserError(
                    f"also_log={name}: its package is not installed; pip install 'blockwise-advantage[{name}]'"
                ) from error
            raise
    return found


def check_config(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration of a training run as plain dicts, after its options were checked. Raises UserError."""
    import lightning as L

    config: dict[str, Any] = plain(cfg)
    # Callbacks come last: they refer to parts, whose mistakes are to be named by their own keys.
    validate.check_parts({key: config[key] for key in sorted(config, key="callbacks".__eq__)})
    validate.check_options("strategy", L.Trainer, config["strategy"])
    validate.check_options("training", get_type_hints(schema.of_run(config))["training"], config["training"])
    check_devices(config["strategy"])
    check_sharded(config)
    return config


def make_optimizer(cfg: DictConfig) -> Any:
    """Return the maker of the optimiser, after it made one of an invented parameter. Raises UserError if it cannot."""
    import torch

    betas = cfg.optimizer.get("betas")
    if betas is not None and len(betas) != 2:
        raise cli.UserError(f"optimizer.betas={list(betas)}: must be two numbers")
    maker = make(cfg.optimizer)
    try:
        maker([torch.nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError) as error:
        raise cli.UserError(f"optimizer: {error}; see the options in conf/optimizer") from error
    return maker


def make_pipeline(cfg: DictConfig, policy: "Policy", task: "Task") -> "Pipeline":
    """Make the pipeline of `policy` on the problems of `task`, as the configuration of a run describes it.

    With `max_prompt_tokens`, problems with longer prompts are left out.
    """
    from bae.objectives.scoring import Scorer
    from bae.rollout.pipeline import Pipeline
    from bae.text.tokens import token_bytes

    blocks, objectives = make_format(cfg)
    pipeline = Pipeline(
        policy=policy,
        engine=make(cfg.rollout),
        scorer=Scorer(blocks, objectives, task.verifier, token_bytes(policy.tokenizer), cfg.objectives.malformed),
        task=task,
        system_prompt=cfg.objectives.system_prompt,
        examples=plain(cfg.objectives.examples),
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
    )
    return pipeline if cfg.max_prompt_tokens is None else pipeline.with_short_prompts(cfg.max_prompt_tokens)


def make_format(cfg: DictConfig) -> "tuple[tuple[Block, ...], list[Objective]]":
    """Make the blocks of a completion and their objectives."""
    from bae.text.blocks import make_blocks

    objectives = [make(spec, name=name) for name, spec in cfg.objectives.rewards.items()]
    return make_blocks(plain(cfg.objectives.blocks)), [
        replace(o, reward=_undeferred(o.reward), group_reward=_undeferred(o.group_reward)) for o in objectives
    ]


def _undeferred(function: Any) -> Any:
    """Return a plain partial instead of Hydra's own, which checks its target at every call: 0.1 ms a completion."""
    return partial(function.func, *function.args, **function.keywords) if isinstance(function, partial) else function


def run_folder(key: str, value: str, cfg: DictConfig) -> Path:
    """Return the output folder of a run.

    Args:
        key: under which the user named it.
        value: the folder, the run's id in MLflow, or `latest` for the run that was begun last below `cfg.outputs`.
        cfg: of the command.

    Raises:
        UserError: if there is no such run.
    """
    from bae.report.tracking import find_run_folder

    if value == LATEST:
        folder = newest_run(key, Path(cfg.outputs))
    else:
        folder = Path(value) if Path(value).is_dir() else find_run_folder(key, value, cfg.logger.tracking_uri)
    if not (folder / RUN_FILE).is_file() and not (folder / LOG).is_file():  # MLflow may not have made the run yet
        raise cli.UserError(
            f"{key}={value}: {folder} is not the output folder of a run; it has neither {RUN_FILE} nor {LOG}"
        )
    return folder


def newest_run(key: str, outputs: Path) -> Path:
    """Return the folder of the run that was begun last below a folder. Raises UserError if there is none."""
    begun = [path.parent for path in outputs.rglob(CONFIG_FILE) if (path.parent / LOG).is_file()]
    if not begun:
        raise cli.UserError(f"{key}={LATEST}: there is no run below {outputs}; name its folder, or set outputs")
    # The file is written once, when a run begins. Names do not tell: in a sweep they are numbers.
    newest = max(begun, key=lambda folder: (folder / CONFIG_FILE).stat().st_mtime)
    print(f"{key}={LATEST}: the run in {newest}", file=sys.stderr)
    return newest


def run_id_of(folder: Path) -> str | None:
    """Return the id in MLflow of the run in `folder`, or None if MLflow has not made it yet."""
    file = folder / RUN_FILE
    return file.read_text().strip() if file.is_file() else None


def logger_of(saved: DictConfig, folder: Path) -> Any:
    """Make the logger of the run in `folder`, to log more to it. saved: its configuration."""
    return make(saved.logger, folder=str(folder), run_id=run_id_of(folder))


def saved_config(key: str, folder: Path, trust: Sequence[str], overrides: Sequence[str] = ()) -> DictConfig:
    """Return the configuration of the run in `folder`, with the values that were changed on this command line.

    All references in it are resolved, so that what was checked is what is made.

    Args:
        key: under which the user named the run.
        folder: of the run.
        trust: see `bae.commands.trust.check_trusted`.
        overrides: of the command line.

    Raises:
        UserError: for a run of another version, one that names what is not trusted, and for an override that is not a
            value.
    """
    saved = OmegaConf.load(folder / CONFIG_FILE)
    assert isinstance(saved, DictConfig)
    check_version(folder, saved)
    for override in overrides:
        if OmegaConf.is_dict(OmegaConf.select(saved, override.partition("=")[0])):
            raise cli.UserError(f"{override}: a resumed run keeps its parts; only values can change, as in steps=300")
    changes = [OmegaConf.from_dotlist(list(overrides)), {"output_folder": str(folder.absolute())}]
    merged = OmegaConf.merge(OmegaConf.structured(schema.of_run(saved)), saved)
    OmegaConf.set_struct(merged, True)
    resolved = plain(OmegaConf.merge(merged, *changes))
    check_trusted(key, folder, resolved, trust)
    final = OmegaConf.merge(OmegaConf.structured(schema.of_run(saved)), resolved)
    assert isinstance(final, DictConfig)
    return final


def check_version(folder: Path, saved: DictConfig) -> None:
    """Refuse the configuration of a run whose parts are not in this version. Raises UserError."""
    from bae.report.tracking import made_by

    for path, node in validate.parts(OmegaConf.to_container(saved), ""):
        target = str(node["_target_"])
        if not target.startswith("bae."):
            continue  # a user's own, or a library's
        try:
            validate.find_target(path, target)
        except cli.UserError as error:
            maker = made_by(run_id_of(folder), saved.logger.tracking_uri)
            raise cli.UserError(
                f"{folder}: this run was made by {maker}, and its {path} is {target}, which this version lacks; "
                "use that version, or make the run anew with this one"
            ) from error


def trained(cfg: DictConfig, name: str = "policy") -> "tuple[Path, DictConfig, Pipeline]":
    """Return the output folder of the run that `cfg.run` names, its configuration, and the pipeline of its policy.

    The pipeline works on `cfg.task`, by default the run's own, with `cfg.temperature` and `cfg.max_new_tokens`.

    Args:
        cfg: of the command.
        name: of the policy's folder in the run's.

    Raises:
        UserError: if there is no such policy.
    """
    import torch

    from bae.callbacks import best
    from bae.training.policy import load_pretrained

    quieten()
    validate.check_parts(plain(cfg))
    check_device(cfg.device)
    folder = run_folder("run", cfg.run, cfg)
    before = saved_config("run", folder, cfg.trust)
    if name == best.FOLDER and not (folder / name).is_dir():
        raise cli.UserError(
            f"policy=best: {folder} kept none; callbacks.checkpoints.best=val/ece keeps one in training"
        )
    if not (folder / name).is_dir():
        raise cli.UserError(f"run={cfg.run}: {folder} has no policy yet; finish it with: bae-train resume={folder}")
    policy = load_pretrained(
        str(folder / name),
        before.model.dtype,
        before.model.prompt_template,
        before.model.get("trust_remote_code", False),
        chat_template_kwargs=plain(before.model).get("chat_template_kwargs"),
    )
    policy.model.to(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    pipeline = make_pipeline(before, policy, make(cfg.task or before.task))
    limit = cfg.max_new_tokens or before.max_new_tokens
    return folder, before, replace(pipeline, temperature=cfg.temperature, max_new_tokens=limit)


def quieten() -> None:
    """Silence what libraries say of themselves. Warnings that a user can act on stay."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its tables; a locked file, with a traceback
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")  # meant: no dropout
    for between_lightning_and_torch in ("LeafSpec", "all_gather"):
        warnings.filterwarnings("ignore", message=f".*{between_lightning_and_torch}.*is deprecated.*")
