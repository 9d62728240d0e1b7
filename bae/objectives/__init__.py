"""Objectives: what a block of a completion earns. One small file for each reward function or scoring rule.

This room imports `bae.errors`, `bae.text`, `bae.method` and `bae.batch`. Start here for what an objective is, then read
scoring.py (from sampled tokens to rewards), values.py (how a user's function is asked), reward_view.py (what a baseline
sees of the rewards), outcomes.py (what baselines condition on) and refining.py (baselines that are finished in the
training pass).

A reward function is any callable (Completion, …) -> float | None. None means "nothing here to score". An async one is
given what is known before the verifier has judged (WrittenCompletion), and may wait for others, such as a judge, while
more completions are being sampled (async_rewards.py). A group reward is any callable ([Completion, …]) ->
[float | None, …] on all completions of one problem. A scoring rule is any callable (q, c, …) on tensors: the reward of
stating the confidence q where an answer is right (c = 1) or not (c = 0). With a scoring rule it is also known what
another number, or the other outcome, would have earned, and baselines can use that.
Yaml names any of them by `_target_`, so a user's own needs no change here.
"""

import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bae.batch import Completion, WrittenCompletion
from bae.errors import UserError
from bae.text.blocks import ANSWER, CONFIDENCE, Block, tags_named

Reward = Callable[[Completion], float | None]
AsyncReward = Callable[[WrittenCompletion], Awaitable[float | None]]
GroupReward = Callable[[Sequence[Completion]], Sequence[float | None]]
Score = Callable[[Tensor, Tensor], Tensor]

Unanswered = Literal["mask", "zero", "penalise", "fail"]

GRID = 1001
"""Confidences, evenly spaced from 0 to 1, at which the lowest value of a scoring rule is looked for."""


@dataclass(frozen=True)
class Objective:
    """Describe one column of the reward matrix.

    Args:
        name: its name in metrics.
        block: the block whose tokens it moves.
        worst: the lowest reward there is, which `malformed: penalise` gives. With a score it may be left out: it is
            then the lowest value of the score.
        reward: the reward function, or an async one; or else
        score: the scoring rule of a stated number; or else
        group_reward: the reward function of all completions of one problem, which gives one reward for each.
        weight: the factor of its advantage, if several objectives share a block.
        given: the objective of an earlier block whose reward is the outcome that a conditioned baseline conditions on,
            or several such objectives. None for the first block.
        timeout: seconds that one call of the reward or the score may take; None for no limit. Then the run stops, with
            an error that names the objective. See bae.objectives.time_limit. A call of an async reward is given up
            instead, and is unanswered.
        unanswered: what an async reward that did not answer in time gives. `mask` gives no reward, no gradient and no
            place in any mean, `zero` the reward 0, `penalise` the worst reward; `fail` stops the run.
        at_once: calls of an async reward that run at a time.
        number, answer: which `confidence` section states the number, and which `answer` it is about. Both count from
            0, for formats that have several.

    Raises:
        ValueError: if the score has values that are not finite, or goes below `worst`; for a weight, a worst or a
            timeout that cannot work.
        UserError: if the score gives something else than a number for each confidence.
    """

    name: str
    block: str
    worst: float | None = None
    reward: Reward | AsyncReward | None = None
    score: Score | None = None
    group_reward: GroupReward | None = None
    weight: float = 1.0
    given: str | Sequence[str] | None = None
    number: int = 0
    answer: int = 0
    timeout: float | None = 60.0
    unanswered: Unanswered = "mask"
    at_once: int = 256

    def __post_init__(self) -> None:
        where = self.key
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise ValueError(f"{where}.timeout={self.timeout}: must be above 0, or null for no limit")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"{where}.weight={self.weight}: must be 0 or more, and finite")
        if self.worst is not None and not math.isfinite(self.worst):
            raise ValueError(f"{where}.worst={self.worst}: must be finite")
        if self.unanswered not in get_args(Unanswered):
            known = ", ".join(get_args(Unanswered))
            raise ValueError(f"{where}.unanswered={self.unanswered}: no such policy; there are {known}")
        if self.at_once < 1:
            raise ValueError(f"{where}.at_once={self.at_once}: must be 1 or more")
        if self.score is None:
            return
        lowest = lowest_score(where, self.score)
        if self.worst is None:
            object.__setattr__(self, "worst", lowest)
        elif self.worst > lowest + 1e-3 * abs(lowest):
            raise ValueError(
                f"{where}.worst={self.worst}: the score goes down to {lowest:.6g}, so malformed output would pay; "
                "leave worst out"
            )

    @property
    def key(self) -> str:
        """Return its key in the configuration, for messages."""
        return f"objectives.rewards.{self.name}"

    @property
    def is_async(self) -> bool:
        """Tell whether the reward is an async function, or an object that is called as one."""
        function: Any = self.reward
        while isinstance(function, partial):
            function = function.func
        return any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004

    @property
    def givens(self) -> tuple[str, ...]:
        """Return the objectives whose outcomes a conditioned baseline conditions on; none for the first block."""
        return () if self.given is None else (self.given,) if isinstance(self.given, str) else tuple(self.given)


def lowest_score(where: str, score: Score) -> float:
    """Return the lowest value of a scoring rule over a grid of confidences and both outcomes.

    Raises ValueError if a value is not finite. where: the configuration key, for the message.
    """
    q = torch.linspace(0, 1, GRID).unsqueeze(1).expand(-1, 2)
    values = score(q, torch.tensor([0.0, 1.0]).expand(GRID, 2))
    check_score(where, values, q.shape)
    if not values.isfinite().all():
        at = float(q[~values.isfinite()][0])
        raise ValueError(f"{where}.score is not finite for the confidence {at:g}; clip the confidence")
    return float(values.min())


def check_score(where: str, values: Any, shape: torch.Size) -> None:
    """Refuse what a scoring rule gave for confidences of a shape. Raises UserError if it is not a number for each.

    where: the configuration key, for the message.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != shape:
        gave = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UserError(
            f"{where}.score gave {gave} for confidences {tuple(shape)}; it must give a tensor of their shape"
        )


def check_objectives(objectives: Sequence[Objective], blocks: Sequence[Block]) -> None:
    """Refuse objectives that do not fit the blocks or each other.

    Raises ValueError, one sentence, if an objective names a block or an outcome that does not exist, or an outcome that
    comes too late for it.
    """
    if not objectives:
        raise ValueError("objectives.rewards is empty; name at least one objective")
    by_name = {objective.name: objective for objective in objectives}
    order = {block.name: k for k, block in enumerate(blocks)}
    for objective in objectives:
        where = objective.key
        if sum(x is not None for x in (objective.reward, objective.score, objective.group_reward)) != 1:
            raise ValueError(
                f"{where}: give it a reward (of a completion), a score (of a stated number) or a group_reward (of all "
                "completions of a problem), one of the three"
            )
        if objective.worst is None:
            raise ValueError(f"{where}: give it worst, the lowest value of its reward, which malformed output earns")
        if objective.block not in order:
            raise ValueError(f"{where}.block={objective.block}: no such block; there are {', '.join(order)}")
        if objective.score is not None:
            _check_sections(where, objective, blocks)
        for given in objective.givens:
            _check_given(where, objective, given, by_name, order)


def _check_sections(where: str, objective: Objective, blocks: Sequence[Block]) -> None:
    """Refuse a number or an answer that the format does not have."""
    for key, which, name in (("number", objective.number, CONFIDENCE), ("answer", objective.answer, ANSWER)):
        count = len(tags_named(blocks, name))
        if not 0 <= which < count:
            raise ValueError(f"{where}.{key}={which}: the blocks have {count} sections {name!r}, counted from 0")


def _check_given(
    where: str, objective: Objective, given: str, by_name: dict[str, Objective], order: dict[str, int]
) -> None:
    """Refuse an outcome that does not exist, or that is not of an earlier block."""
    if given not in by_name:
        raise ValueError(f"{where}.given={given}: no such objective; there are {', '.join(by_name)}")
    before = by_name[given].block
    if before not in order:
        raise ValueError(f"objectives.rewards.{given}.block={before}: no such block; there are {', '.join(order)}")
    if order[before] >= order[objective.block]:
        raise ValueError(
            f"{where}.given={given}: it must belong to a block before {objective.block}, or the baseline would depend "
            "on the very tokens that it judges"
        )
