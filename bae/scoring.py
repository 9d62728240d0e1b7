"""From samples to rewards: find the blocks, verify the answers, apply each objective, deal with malformed output."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from bae.batch import Completion, Problem, Samples, Scored
from bae.blocks import Block, parse_confidence
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
        completions = []
        rows = zip(problems, samples.completion_ids.tolist(), samples.completion_mask.sum(1).tolist(),
                   samples.ended.tolist(), strict=True)  # fmt: skip
        for n, (problem, ids, length, ended) in enumerate(rows):
            text, spans, positions = locate_blocks(ids[: length - ended], self.vocabulary, self.blocks)
            block_of[n, :length] = torch.tensor(positions[:length])
            confidence = next((parse_confidence(s.content) for s in spans.sections if s.tag == "confidence"), None)
            completions.append(
                Completion(problem, text, spans.sections, spans.well_formed, (), confidence, length, not ended)
            )
        completions = self._verified(completions)
        return self._rewarded(completions, block_of)

    def _verified(self, completions: Sequence[Completion]) -> list[Completion]:
        answers = [[s.content for s in c.sections if s.tag == "answer"] for c in completions]
        pairs = [(a, c.problem.answer) for c, mine in zip(completions, answers, strict=True) for a in mine]
        queue = iter(self.verifier.verify(pairs))
        return [
            replace(c, verdicts=tuple(next(queue) for _ in mine)) for c, mine in zip(completions, answers, strict=True)
        ]

    def _rewarded(self, completions: list[Completion], block_of: torch.Tensor) -> Scored:
        shape = (len(completions), len(self.objectives))
        rewards, present, malformed = torch.zeros(shape), torch.zeros(shape).bool(), torch.zeros(shape).bool()
        for j, (objective, k) in enumerate(zip(self.objectives, self.block_of_objective, strict=True)):
            reached = (block_of == k).any(1).tolist()
            for n, completion in enumerate(completions):
                if not reached[n]:
                    continue
                reward = objective.reward(completion) if completion.well_formed[k] else None
                malformed[n, j] = reward is None
                present[n, j] = reward is not None or self.malformed != "mask"
                rewards[n, j] = reward if reward is not None else objective.worst * (self.malformed == "penalise")
        return Scored(completions, block_of, rewards, present, malformed)
