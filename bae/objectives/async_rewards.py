"""Ask rewards that take time, many at once, while other completions are still being sampled."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any, cast

import torch
from torch import Tensor

from bae import event_loop
from bae.batch import WrittenCompletion
from bae.errors import NoAnswer, UserError
from bae.objectives import AsyncReward, Objective
from bae.objectives.values import as_number, shown

GRACE = 30.0
"""Seconds for which all calls may stand still, beyond the timeout of one."""

MANY = 8
"""Calls of a batch from which on the run stops if none was answered."""

Key = tuple[int, str, str]


class AsyncRewards:
    """Hold the calls of one batch. Completions of a problem with equal texts share a call.

    Args:
        objectives: all of the batch; those that are not async are passed over.
        block_of_objective: the number of each objective's block.
    """

    def __init__(self, objectives: Sequence[Objective], block_of_objective: Sequence[int]) -> None:
        self._objectives, self._blocks = objectives, block_of_objective
        self._async = [j for j, objective in enumerate(objectives) if objective.is_async]
        self._room = {j: asyncio.Semaphore(objectives[j].at_once) for j in self._async}
        self._calls: dict[Key, Future[Any]] = {}

    def begin(self, completion: WrittenCompletion) -> None:
        """Ask all async rewards whose block is in form, without waiting."""
        for j in self._async:
            key = self._key(j, completion)
            if completion.well_formed[self._blocks[j]] and key not in self._calls:
                self._calls[key] = event_loop.start(self._ask(j, completion))

    async def _ask(self, j: int, completion: WrittenCompletion) -> Any:
        """Ask one reward, once there is room. Raises NoAnswer or TimeoutError if it does not answer."""
        objective = self._objectives[j]
        async with self._room[j], asyncio.timeout(objective.timeout):
            return await cast(AsyncReward, objective.reward)(completion)

    def values(self, j: int, completions: Sequence[WrittenCompletion]) -> tuple[Tensor, Tensor]:
        """Wait for the rewards of objective j.

        Returns:
            values: (N,), NaN where there is nothing to score.
            unanswered: (N,) bool, where the reward did not answer. There the value is what the objective says.

        Raises:
            UserError: one sentence, for a reward that is not one number, if none of `MANY` calls was answered, if a
                call blocks all others, or if one was not answered and the objective says `fail`.
        """
        objective, k = self._objectives[j], self._blocks[j]
        values, unanswered = torch.full((len(completions),), torch.nan), torch.zeros(len(completions)).bool()
        asked = [n for n, completion in enumerate(completions) if completion.well_formed[k]]
        for n in asked:
            self.begin(completions[n])
        why = ""
        for n in asked:
            completion = completions[n]
            call = self._calls[self._key(j, completion)]
            self._wait(objective, call)
            error = call.exception()
            if error is None:
                values[n] = as_number(objective.key, completion, call.result())
            elif isinstance(error, (NoAnswer, TimeoutError)):
                unanswered[n] = True
                why = str(error) or "it took too long"
            else:
                error.add_note(f"in {objective.key}, for {shown(completion)}")
                raise error
        count = int(unanswered.sum())
        if count and (objective.unanswered == "fail" or MANY <= len(asked) == count):
            raise UserError(
                f"{objective.key}: {count} of {len(asked)} completions had no answer ({why}); see that what it asks "
                f"can be reached, or set {objective.key}.timeout to more seconds"
            )
        instead = {"zero": 0.0, "penalise": cast(float, objective.worst)}
        values[unanswered] = instead.get(objective.unanswered, torch.nan)
        return values, unanswered

    def close(self) -> None:
        """Drop the calls that still run."""
        for call in self._calls.values():
            call.cancel()
        self._calls = {}

    def _wait(self, objective: Objective, call: "Future[Any]") -> None:
        """Wait for a call, as long as any call ends within its time. Raises UserError if none does."""
        limit = None if objective.timeout is None else objective.timeout + GRACE
        while not call.done():
            before = self._ended()
            wait([call], limit)
            if not call.done() and self._ended() == before:  # it may have ended between the first two lines
                self.close()
                raise UserError(
                    f"{objective.key}: no call ended within {limit:g} seconds, so the function blocks all others; it "
                    "must await what it waits for, as in await asyncio.to_thread(ask, …)"
                )

    def _ended(self) -> int:
        """Return the number of calls that have ended."""
        return sum(call.done() for call in self._calls.values())

    @staticmethod
    def _key(j: int, completion: WrittenCompletion) -> Key:
        return j, completion.problem.id, completion.text
