"""From samples to rewards: find the blocks, verify the answers, apply each objective, deal with malformed output."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bae.batch import ANSWER, Completion, Problem, Samples, Scored
from bae.blocks import Block, Malformed, check_malformed, sections_named
from bae.numbers import Number
from bae.objectives import Objective, check_objectives
from bae.tokens import NUMBER, locate_blocks
from bae.verifier import Verdict, Verifier


class Scorer:
    """Scores completions of one format under one set of objectives.

    vocabulary: `bae.tokens.token_bytes` of the policy's tokenizer.
    malformed: what an objective gives a completion whose block was reached but is not in form (or holds nothing to
        score): `penalise` its worst reward, `zero` the reward 0, `mask` no reward, no gradient, no place in any mean.
        A block may have a policy of its own. A block that was never reached is always masked: it has no tokens.
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
        check_malformed("objectives.malformed", malformed)
        self.blocks = tuple(blocks)
        self.objectives = tuple(objectives)
        self.verifier = verifier
        self.vocabulary = vocabulary
        order = [block.name for block in blocks]
        self.block_of_objective = [order.index(objective.block) for objective in objectives]
        self.malformed = [self.blocks[k].malformed or malformed for k in self.block_of_objective]  # by objective

    @property
    def attempts(self) -> tuple[int, ...]:
        """Of each answer of the format, the first one always among them, which confidence is about it; -1 for none."""
        count = max(1, len(sections_named(self.blocks, ANSWER)))
        about = {objective.answer: objective.number for objective in self.objectives if objective.score is not None}
        spare = -1 if 0 in about.values() else 0  # the first number is about the first answer, unless about another
        return tuple(about.get(attempt, spare if attempt == 0 else -1) for attempt in range(count))

    @property
    def closing(self) -> str:
        """The tag that ends a stated number."""
        return next((tags.closing for tags in sections_named(self.blocks, NUMBER)), f"</{NUMBER}>")

    def __call__(self, problems: Sequence[Problem], samples: Samples) -> Scored:
        """problems: N, one for each completion."""
        block_of = torch.full(samples.completion_ids.shape, -1)
        completions: list[Completion] = []
        numbers: list[tuple[Number, ...]] = []
        rows = zip(problems, samples.completion_ids.tolist(), samples.completion_mask.sum(1).tolist(),
                   samples.ended.tolist(), strict=True)  # fmt: skip
        for n, (problem, ids, length, ended) in enumerate(rows):
            located = locate_blocks(ids[: length - ended], self.vocabulary, self.blocks, ended)
            positions, spans = located.block_of[:length], located.spans
            block_of[n, :length] = torch.tensor(positions)
            numbers.append(located.numbers)
            stated = tuple(number.value for number in located.numbers)
            counts = Counter(positions)
            tokens = {block.name: counts[k] for k, block in enumerate(self.blocks)}
            completions.append(Completion(problem, located.text, spans.sections, spans.well_formed, (), stated, length,
                                          not ended, tokens))  # fmt: skip
        completions = self._verified(completions)
        return self._rewarded(completions, block_of, numbers)

    def _verified(self, completions: Sequence[Completion]) -> list[Completion]:
        answers = [[s.content for s in c.sections if s.tag == ANSWER] for c in completions]
        pairs = [(a, c.problem.answer) for c, mine in zip(completions, answers, strict=True) for a in mine]
        different = list(dict.fromkeys(pairs))  # samples of one problem often agree, and those of one prefix always do
        verdicts = dict(zip(different, self.verifier.verify(different), strict=True))
        verified = [
            replace(c, verdicts=tuple(verdicts[answer, c.problem.answer] for answer in mine))
            for c, mine in zip(completions, answers, strict=True)
        ]
        return self._compared(verified, answers) if any(len(mine) > 1 for mine in answers) else verified

    def _compared(self, completions: Sequence[Completion], answers: Sequence[Sequence[str]]) -> list[Completion]:
        """Which later answers are the first one again. Two right answers are equal, a right and a wrong one are not;
        only of two wrong ones is the verifier asked."""
        wrong = [
            (answer, mine[0])
            for c, mine in zip(completions, answers, strict=True)
            for answer, verdict in list(zip(mine, c.verdicts, strict=True))[1:]
            if not c.correct and verdict is not Verdict.CORRECT
        ]
        different = list(dict.fromkeys(wrong))
        equal = dict(zip(different, self.verifier.equivalent(different), strict=True))
        compared = []
        for c, mine in zip(completions, answers, strict=True):
            right = [verdict is Verdict.CORRECT for verdict in c.verdicts]
            repeats = [
                a == 0 or (right[0] if right[a] else not right[0] and equal[mine[a], mine[0]]) for a in range(len(mine))
            ]
            compared.append(replace(c, repeats=tuple(repeats)))
        return compared

    def _rewarded(self, completions: list[Completion], block_of: Tensor, numbers: Sequence[Sequence[Number]]) -> Scored:
        shape = (len(completions), len(self.objectives))
        rewards, present, malformed = torch.zeros(shape), torch.zeros(shape).bool(), torch.zeros(shape).bool()
        for j, (objective, k) in enumerate(zip(self.objectives, self.block_of_objective, strict=True)):
            reached = (block_of == k).any(1)
            values = _values(objective, completions)
            values[~torch.tensor([c.well_formed[k] for c in completions], dtype=torch.bool)] = torch.nan
            malformed[:, j] = reached & values.isnan()
            present[:, j] = reached & ~(malformed[:, j] & (self.malformed[j] == "mask"))
            rewards[:, j] = torch.where(malformed[:, j], self.spoilt(j), values).where(present[:, j], 0.0)
        return Scored(completions, block_of, rewards, present, malformed, numbers)

    def spoilt(self, j: int) -> float:
        """What objective number j gives a completion whose block is malformed."""
        return self.objectives[j].worst if self.malformed[j] == "penalise" else 0.0


def _values(objective: Objective, completions: Sequence[Completion]) -> Tensor:
    """(N,): the reward of each completion, NaN where there is nothing to score."""
    if objective.score is not None:
        q = confidences(completions, objective.number)
        # A score may well make a number of NaN, by a comparison or a clamp.
        return torch.where(q.isnan(), torch.nan, objective.score(q, correctness(completions, objective.answer)))
    assert objective.reward is not None  # check_objectives
    rewards = map(objective.reward, completions)
    return torch.tensor([torch.nan if reward is None else reward for reward in rewards])


def confidences(completions: Sequence[Completion], which: int = 0) -> Tensor:
    """(N,): the stated confidences, NaN where there is none."""
    stated = (c.stated(which) for c in completions)
    return torch.tensor([torch.nan if q is None else q for q in stated])


def correctness(completions: Sequence[Completion], which: int = 0) -> Tensor:
    """(N,): 1 where the answer is right, else 0."""
    return torch.tensor([float(c.is_correct(which)) for c in completions])
