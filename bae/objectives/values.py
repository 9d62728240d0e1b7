"""From completions to the rewards of one objective. What a user's function gives is checked, and it may not hang."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from bae.batch import Completion, Problem, WrittenCompletion
from bae.errors import UserError
from bae.objectives import Objective, Reward, check_score
from bae.objectives.time_limit import Clock, TimeUp, time_limit

SHOWN = 200
"""The characters of a completion that a message shows."""


def reward_values(objective: Objective, completions: Sequence[Completion]) -> Tensor:
    """Return (N,): the reward of each completion, NaN where there is nothing to score.

    An infinite reward passes: it comes of a formula, such as log 0, and a rare text. No run need end for that; the
    training step is skipped. NaN has no such meaning, and it would look like malformed output. So it is an error.

    Raises:
        UserError: one sentence with the objective and the completion, for a reward that is NaN or not one number, for a
            score of another shape, and for a function that does not return in time.
    """
    with _guarded(objective) as clock:
        if objective.group_reward is not None:
            return _group_rewards(objective, completions, clock)
        if objective.score is None:
            ask = cast(Reward, objective.reward)  # it has one, check_objectives; async ones are asked elsewhere
            rewards = []
            for completion in completions:
                clock.begin(completion)
                reward = ask(completion)
                is_plain = type(reward) is float and reward == reward  # nearly all are; this is for speed
                rewards.append(reward if is_plain else as_number(objective.key, completion, reward))
            return torch.tensor(rewards)
        q = stated_confidences(completions, objective.number)
        values = objective.score(q, correct_flags(completions, objective.answer))
    check_score(objective.key, values, q.shape)
    for n in (values.isnan() & ~q.isnan()).nonzero().flatten().tolist():
        raise UserError(f"{objective.key}.score gave nan for the confidence {q[n]:g} of {shown(completions[n])}")
    # A score may make a number of NaN, by a comparison or a clamp.
    return torch.where(q.isnan(), torch.nan, values)


def _group_rewards(objective: Objective, completions: Sequence[Completion], clock: Clock) -> Tensor:
    """Ask a group reward about the completions of each problem; (N,), NaN where there is nothing to score."""
    assert objective.group_reward is not None
    members: dict[Problem, list[int]] = {}
    for n, completion in enumerate(completions):
        members.setdefault(completion.problem, []).append(n)
    rewards = torch.full((len(completions),), torch.nan)
    for rows in members.values():
        group = [completions[n] for n in rows]
        clock.begin(group[0])
        found = objective.group_reward(group)
        try:
            given = list(found)
        except TypeError:
            given = None
        if given is None or len(given) != len(group):
            gave = f"{len(given)} rewards" if given is not None else _kind(found)
            raise UserError(
                f"{objective.key}.group_reward gave {gave} for the {len(group)} completions of problem "
                f"{group[0].problem.id}; it must give one number, or None, for each"
            )
        numbers = [as_number(objective.key, c, r, "group_reward") for c, r in zip(group, given, strict=True)]
        rewards[torch.tensor(rows)] = torch.tensor(numbers)
    return rewards


def stated_confidences(completions: Sequence[Completion], which: int = 0) -> Tensor:
    """Return (N,): the stated confidences, NaN where there is none."""
    stated = (c.stated(which) for c in completions)
    return torch.tensor([torch.nan if q is None else q for q in stated])


def correct_flags(completions: Sequence[Completion], which: int = 0) -> Tensor:
    """Return (N,): 1 where the answer is right, else 0."""
    return torch.tensor([float(c.is_correct(which)) for c in completions])


@contextmanager
def _guarded(objective: Objective) -> Iterator[Clock]:
    """Stop an objective's function after its timeout, with a UserError; add to its own errors where they arose."""
    clock = Clock()
    try:
        with time_limit(clock, objective.timeout):
            yield clock
    except TimeUp as error:
        raise UserError(
            f"{objective.key} did not return within {objective.timeout:g} seconds for {shown(clock.call)}; mend the "
            f"function, or set {objective.key}.timeout to more seconds"
        ) from error
    except Exception as error:
        error.add_note(f"in {objective.key}, for {shown(clock.call)}")
        raise


def as_number(key: str, completion: WrittenCompletion, reward: Any, function: str = "reward") -> float:
    """Return a reward as a float, NaN for None. Raises UserError for NaN, and for what is not one real number."""
    if reward is None:
        return math.nan
    if hasattr(reward, "item") and getattr(reward, "shape", None) == ():
        reward = reward.item()  # a scalar of torch or NumPy
    if not isinstance(reward, Real):
        raise UserError(
            f"{key}.{function} gave {_kind(reward)} for {shown(completion)}; it must give one number, or None where "
            "there is nothing to score"
        )
    if math.isnan(reward):
        raise UserError(f"{key}.{function} gave nan for {shown(completion)}; give None where there is nothing to score")
    return float(reward)


def _kind(value: Any) -> str:
    """Return the type of a value, and its shape if it has one."""
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}")


def shown(completion: WrittenCompletion | None) -> str:
    """Return a completion in a few words; None for a function of the whole batch."""
    if completion is None:
        return "the confidences of a batch"
    text = completion.text
    cut = text[:SHOWN] + "…" if len(text) > SHOWN else text
    return f"problem {completion.problem.id} and the completion {cut!r}"
