"""Show the prompts that a run would begin with, as the policy reads them."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from bae.commands import cli
from bae.commands.build import make_run, plain
from bae.text.visible import visible

if TYPE_CHECKING:
    from bae.batch import Problem
    from bae.rollout.pipeline import Pipeline
    from bae.training.module import Trains
    from bae.training.policy import Policy

SHOWN = 3
"""The prompts that are shown."""


def preview(
    cfg: DictConfig, check: Callable[[DictConfig], None], make_update: "Callable[[DictConfig, Pipeline], Trains]"
) -> None:
    """Print the first prompts of the first step, and train nothing.

    The parts of the run are made as for training, so what training would refuse is refused here. The arguments are as
    in `bae.commands.train.fit`.
    """
    from bae.tasks.loader import problem_indices

    with cli.user_errors():
        if cfg.resume:
            raise cli.UserError(f"preview=true, resume={cfg.resume}: only a new run can be previewed; leave resume out")
        check(cfg)
        trainer, module, data = make_run(cfg, make_update, None, "preview")
    if not trainer.is_global_zero:
        return
    indices = problem_indices(cfg.seed, 0, data.task.size(data.split), cfg.prompts_per_step)[:SHOWN]
    for index in indices:
        problem = data.task.problem(data.split, index)
        print("\n".join(lines(module.policy, problem, cfg)))
    print(f"the first {len(indices)} of {cfg.prompts_per_step} prompts of step 1; nothing was trained (preview=true)")


def lines(policy: "Policy", problem: "Problem", cfg: DictConfig) -> Iterator[str]:
    """Yield a prompt with its special tokens, and what is known of its problem."""
    ids = policy.encode(cfg.objectives.system_prompt, problem.question, plain(cfg.objectives.examples))
    yield f"problem {visible(problem.id)}: {len(ids)} tokens, reference {visible(problem.answer)}"
    text = visible(policy.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    yield from (f"  | {line}".rstrip() for line in text.split("\n"))
    yield ""
