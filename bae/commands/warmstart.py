"""`bae-warmstart`: teach a policy a format, by demonstrations, before reinforcement learning begins.

It teaches the policy to keep to the format, and as much of the task as the demonstrations show. It does not teach what
the format is there for: to know how sure one is, or to mend a first attempt. A warm start is a run like those of
bae-train: it is logged, checkpointed and resumed alike, and leaves a policy that `model.path=` takes.
"""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from bae.commands import cli
from bae.commands.build import plain
from bae.commands.checks import check_warmstart
from bae.commands.train import fit

if TYPE_CHECKING:
    from bae.rollout.pipeline import Pipeline
    from bae.training.supervised import SupervisedUpdate


def main() -> None:
    """Run `bae-warmstart`."""
    cli.run(warm_start, "warmstart")


def warm_start(cfg: DictConfig) -> Path | None:
    """Train one run on demonstrations, print how to go on with the policy, and return the folder of the run.

    Returns None if the run was done before.
    """
    folder = fit(cfg, check, supervised_update)
    if folder is not None:
        template = cfg.model.get("prompt_template")
        quoted = "" if template is None else f" {shlex.quote(f'model.prompt_template={json.dumps(template)}')}"
        print(f"train it bae-train model=pretrained model.path={folder / 'policy'}{quoted}")
    return folder


def check(cfg: DictConfig) -> None:
    """Refuse values that cannot work. Raises UserError."""
    for group in ("model", "task"):
        if not cfg[group]:
            raise cli.UserError(f"{group}: name one, {group}={', '.join(cli.options(group))}; or choose an experiment")
    check_warmstart(cfg)


def supervised_update(cfg: DictConfig, pipeline: "Pipeline") -> "SupervisedUpdate":
    """Make the update that the configuration describes."""
    from bae.training.options import StepOptions
    from bae.training.supervised import SupervisedUpdate

    return SupervisedUpdate(pipeline.policy.model, StepOptions(**plain(cfg.training)))


if __name__ == "__main__":
    main()
