"""From samples to rewards: find the blocks, verify the answers, apply each objective, deal with malformed output."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from bae.batch import Completion, Problem, Samples, Scored
from bae.blocks import Block
from bae.numbers import Number
from bae.objectives import Objective, check_objectives
from bae.tokens import locate_blocks
from bae.verifier import Verifier

Malformed = Literal["penalise", "mask", "zero"]


class Scorer:
    """Scores completions of one format under one set of objectives.

    vocabulary: `bae.tokens.token_bytes` of the policy's tokenizer.
    malformed: what an objective gives a completion whose block was reached but is not in form (or holds nothing to
        score): `penalise` its worst reward, `zero` the reward 0, `mask` no reward, no gradient, no place in any mean.
        A block that was never reached is always masked: it has no tokens.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        objectives: Sequence[Objective],
        verifier: Verifier,
        vocabulary: Sequence[bytes],
        malformed: Malformed = "penalise",
    ):
        check_objectives(objectives, blocks)
        if malformed not in ("penalise", "mask", "zero"):
            raise ValueError(f"objectives.malformed={malformed}: choose penalise, mask or zero")
        self.blocks = tuple(blocks)
        self.objectives = tuple(objectives)
        self.verifier = verifier
        self.vocabulary = vocabulary
        self.malformed = malformed
        order = [block.name for block in blocks]
        self.block_of_objective = [order.index(objective.block) for objective in objectives]

    def __call__(self, problems: Sequence[Problem], samples: Samples) -> Scored:
        """problems: N, one for each completion."""
        block_of = torch.full(samples.completion_ids.shape, -1)
        completions: list[Completion] = []
        numbers: list[Number | None] = []
        rows = zip(problems, samples.completion_ids.tolist(), samples.completion_mask.sum(1).tolist(),
                   samples.ended.tolist(), strict=True)  # fmt: skip
        for n, (problem, ids, length, ended) in enumerate(rows):
            text, spans, positions, number = locate_blocks(ids[: length - ended], self.vocabulary, self.blocks, ended)
            block_of[n, :length] = torch.tensor(positions[:length])
            confidence = None if number is None else number.value
            numbers.append(number)
            completions.append(
                Completion(problem, text, spans.sections, spans.well_formed, (), confidence, length, not ended)
            )
        completions = self._verified(completions)
        return self._rewarded(completions, block_of, numbers)

    def _verified(self, completions: Sequence[Completion]) -> list[Completion]:
        answers = [[s.content for s in c.sections if s.tag == "answer"] for c in completions]
        pairs = [(a, c.problem.answer) for c, mine in zip(completions, answers, strict=True) for a in mine]
        different = list(dict.fromkeys(pairs))  # samples of one problem often agree, and those of one prefix always do
        verdicts = dict(zip(different, self.verifier.verify(different), strict=True))
        return [
            replace(c, verdicts=tuple(verdicts[answer, c.problem.answer] for answer in mine))
            for c, mine in zip(completions, answers, strict=True)
        ]

    def _rewarded(self, completions: list[Completion], block_of: Tensor, numbers: Sequence[Number | None]) -> Scored:
        shape = (len(completions), len(self.objectives))
        rewards, present, malformed = torch.zeros(shape), torch.zeros(shape).bool(), torch.zeros(shape).bool()
        for j, (objective, k) in enumerate(zip(self.objectives, self.block_of_objective, strict=True)):
            reached = (block_of == k).any(1)
            values = _values(objective, completions)
            values[~torch.tensor([c.well_formed[k] for c in completions], dtype=torch.bool)] = torch.nan
            malformed[:, j] = reached & values.isnan()
            present[:, j] = reached & ~(malformed[:, j] & (self.malformed == "mask"))
            rewards[:, j] = torch.where(malformed[:, j], self.spoilt(objective), values).where(present[:, j], 0.0)
        return Scored(completions, block_of, rewards, present, malformed, numbers)

    def spoilt(self, objective: Objective) -> float:
        """What the objective gives a completion whose block is malformed."""
        return objective.worst if self.malformed == "penalise" else 0.0


def _values(objective: Objective, completions: Sequence[Completion]) -> Tensor:
    """(N,): the reward of each completion, NaN where there is nothing to score."""
    if objective.score is not None:
        return objective.score(confidences(completions), correctness(completions))
    assert objective.reward is not None  # check_objectives
    rewards = map(objective.reward, completions)
    return torch.tensor([torch.nan if reward is None else reward for reward in rewards])


def confidences(completions: Sequence[Completion]) -> Tensor:
    """(N,): the stated confidences, NaN where there is none."""
    return torch.tensor([torch.nan if c.confidence is None else c.confidence for c in completions])


def correctness(completions: Sequence[Completion]) -> Tensor:
    """(N,): 1 where the first answer is right, else 0."""
    return torch.tensor([float(c.correct) for c in completions])
