"""Choose the problems that each step trains on: a pure function of (seed, step, rank)."""

from collections.abc import Iterator
from functools import lru_cache, partial
from heapq import nlargest

import lightning as L
import numpy as np
import torch

from bae import seeds
from bae.batch import Problem, RolloutBatch
from bae.tasks import Task

LOOKED_AT = 10_000
"""The problems of a split among which the longest are looked for."""


def problem_indices(seed: int, step: int, size: int, count: int) -> list[int]:
    """Return the `count` problems of one step over all ranks. Epochs are permutations, seeded by (seed, epoch)."""
    positions = range(step * count, (step + 1) * count)
    return [int(_epoch_order(seed, position // size, size)[position % size]) for position in positions]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def share_of(prompts_per_step: int, ranks: int) -> int:
    """Return the prompts of one rank. Raises ValueError, one sentence, if the ranks cannot have equal shares."""
    if prompts_per_step % ranks:
        raise ValueError(
            f"prompts_per_step={prompts_per_step} does not divide over {ranks} ranks; choose a multiple of {ranks}"
        )
    return prompts_per_step // ranks


def longest(task: Task, split: str) -> list[Problem]:
    """Return the problems of a split that have the longest questions, among the first LOOKED_AT, longest first."""
    among = range(min(task.size(split), LOOKED_AT))
    return nlargest(4, (task.problem(split, i) for i in among), key=lambda problem: len(problem.question))


class PromptLoader:
    """Yield the batch of each step. Its whole state is the number of the next step, which Lightning checkpoints.

    Args:
        task, split: where problems come from.
        steps: of the whole run.
        prompts: of a step on this rank.
        group_size: completions of each prompt.
        seed: of the order.
        rank, world: this rank, and how many there are.
    """

    def __init__(
        self, task: Task, split: str, steps: int, prompts: int, group_size: int, seed: int, rank: int, world: int
    ) -> None:
        self.task = task
        self.split = split
        self.steps = steps
        self.prompts = prompts
        self.group_size = group_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.next_step = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[RolloutBatch]:
        while self.next_step < self.steps:
            step = self.next_step
            self.next_step += 1
            indices = problem_indices(self.seed, step, self.task.size(self.split), self.prompts * self.world)
            further = partial(self._further, step)
            yield RolloutBatch(step, self._mine(indices), self.group_size, further=further)

    def _further(self, step: int, number: int) -> list[Problem]:
        """Draw other problems, apart from the order of the steps; number: the round, from 1."""
        draw = np.random.default_rng(seeds.key(self.seed, seeds.Namespace.FURTHER_PROBLEMS, step, number))
        return self._mine(draw.integers(self.task.size(self.split), size=self.prompts * self.world).tolist())

    def _mine(self, indices: list[int]) -> list[Problem]:
        """Return this rank's share of the problems of all ranks."""
        share = indices[self.rank * self.prompts : (self.rank + 1) * self.prompts]
        return [self.task.problem(self.split, i) for i in share]

    def state_dict(self) -> dict[str, int]:
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_step = state["next_step"]


class PromptDataModule(L.LightningDataModule):
    """Give the trainer its batches. prompts_per_step counts over all ranks, and each rank takes an equal share.

    Raises:
        ValueError: for a split that cannot be had; for prompts that do not divide over the ranks.
    """

    def __init__(
        self, task: Task, steps: int, prompts_per_step: int, group_size: int, seed: int, split: str = "train"
    ) -> None:
        super().__init__()
        task.size(split)  # raises for a split that cannot be had, before any work
        self.task = task
        self.steps = steps
        self.prompts_per_step = prompts_per_step
        self.group_size = group_size
        self.seed = seed
        self.split = split

    def transfer_batch_to_device(self, batch: RolloutBatch, device: torch.device, dataloader_idx: int) -> RolloutBatch:
        """Leave the batch where it is: it comes without tensors, and each micro-batch is moved when its turn comes."""
        return batch

    def train_dataloader(self) -> PromptLoader:
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        share = share_of(self.prompts_per_step, world)
        return PromptLoader(self.task, self.split, self.steps, share, self.group_size, self.seed, rank, world)
