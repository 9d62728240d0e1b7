"""From sampled tokens to rewards: find blocks, verify answers, apply each objective, handle malformed output."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bae.batch import Completion, Problem, SampledTokens, Scored, WrittenCompletion
from bae.errors import UserError
from bae.objectives import Objective, check_objectives
from bae.objectives.async_rewards import AsyncRewards
from bae.objectives.values import reward_values
from bae.text.blocks import ANSWER, CONFIDENCE, Block, Malformed, Section, check_malformed, tags_named
from bae.text.number import Number
from bae.text.tokens import Located, locate_blocks
from bae.text.verdict import Verdict
from bae.text.verifier import Pair, Pending, Verifier


class Scorer:
    """Score completions of one format under one set of objectives.

    Args:
        blocks: the blocks of the format.
        objectives: the columns of the reward matrix.
        verifier: checks answers.
        vocabulary: the bytes of each token id of the policy's tokenizer, of `bae.text.tokens.token_bytes`.
        malformed: what an objective gives a completion whose block was reached but is not in form, or holds nothing to
            score. `penalise` gives its worst reward, `zero` the reward 0, `mask` no reward, no gradient and no place
            in any mean. A block may have a policy of its own. A block that was never reached is always masked, because
            it has no tokens.

    Raises:
        ValueError: for objectives that do not fit the blocks, or an unknown policy for malformed output.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        objectives: Sequence[Objective],
        verifier: Verifier,
        vocabulary: Sequence[bytes],
        malformed: Malformed = "penalise",
    ) -> None:
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
        """For each answer section, return the index of the confidence section about it, or -1.

        There is always an entry for a first answer.
        """
        count = max(1, len(tags_named(self.blocks, ANSWER)))
        about = {objective.answer: objective.number for objective in self.objectives if objective.score is not None}
        spare = -1 if 0 in about.values() else 0  # the first number is about the first answer, unless about another
        return tuple(about.get(attempt, spare if attempt == 0 else -1) for attempt in range(count))

    @property
    def closing(self) -> str:
        """Return the tag that ends a stated number."""
        return next((tags.closing for tags in tags_named(self.blocks, CONFIDENCE)), f"</{CONFIDENCE}>")

    def malformed_reward(self, j: int) -> float:
        """Return what objective number j gives a completion whose block is malformed."""
        worst = self.objectives[j].worst
        assert worst is not None  # check_objectives
        return worst if self.malformed[j] == "penalise" else 0.0

    def __call__(self, problems: Sequence[Problem], samples: SampledTokens) -> Scored:
        """Score N completions; problems: one for each."""
        with self.begin(problems) as scoring:
            return scoring.finish(samples)

    @contextmanager
    def begin(self, problems: Sequence[Problem]) -> Iterator["Scoring"]:
        """Score completions that come in one by one. An error in the body drops what is under way."""
        scoring = Scoring(self, problems)
        try:
            yield scoring
        except BaseException:
            self.verifier.close()
            scoring.calls.close()
            raise

    def reward(
        self,
        completions: Sequence[Completion],
        block_of: Tensor,
        numbers: Sequence[Sequence[Number]],
        calls: AsyncRewards,
    ) -> Scored:
        """Reward completions that have their verdicts. block_of, numbers: as in Scored; calls: of async rewards."""
        answers = [_answers(c.sections) for c in completions]
        if any(len(mine) > 1 for mine in answers):
            completions = self._with_repeats(completions, answers)
        shape = (len(completions), len(self.objectives))
        rewards, present, malformed = torch.zeros(shape), torch.zeros(shape).bool(), torch.zeros(shape).bool()
        unanswered = torch.zeros(shape).bool()
        for j, (objective, k) in enumerate(zip(self.objectives, self.block_of_objective, strict=True)):
            reached = (block_of == k).any(1)
            if objective.is_async:
                values, unanswered[:, j] = calls.values(j, completions)
            else:
                values = reward_values(objective, completions)
            values[~torch.tensor([c.well_formed[k] for c in completions], dtype=torch.bool)] = torch.nan
            self._warn_of_worst(j, values)
            nothing = values.isnan()
            malformed[:, j] = reached & nothing & ~unanswered[:, j]
            masked = malformed[:, j] & (self.malformed[j] == "mask") | unanswered[:, j] & nothing
            present[:, j] = reached & ~masked
            rewards[:, j] = torch.where(malformed[:, j], self.malformed_reward(j), values).where(present[:, j], 0.0)
        return Scored(list(completions), block_of, rewards, present, malformed, numbers, unanswered)

    def _warn_of_worst(self, j: int, values: Tensor) -> None:
        """Warn if a completion in form earned less than a malformed one does; values: (N,), NaN for malformed ones."""
        objective = self.objectives[j]
        if self.malformed[j] == "penalise" and (values.isfinite() & (values < self.malformed_reward(j))).any():
            warnings.warn(  # the text is the same each time, so it is shown once
                f"{objective.key}.worst={objective.worst}: a completion in form earned less, so malformed output pays; "
                "give the lowest reward there is",
                stacklevel=2,
            )

    def _with_repeats(self, completions: Sequence[Completion], answers: Sequence[Sequence[str]]) -> list[Completion]:
        """Tell which later answers repeat the first one.

        Two right answers are equal, and a right and a wrong one are not. The verifier is asked only about two wrong
        answers.
        """
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


class _Read(NamedTuple):
    """Hold a completion as it was sampled, and what was found in it."""

    ids: list[int]
    ended: bool
    located: Located
    written: WrittenCompletion


class Scoring:
    """Score one batch while it is being sampled.

    A completion that is added is read, its answers go to the verifier, and async rewards are asked. That saves waiting
    later. The scores depend only on what `finish` is given.

    Args:
        scorer: the format and the objectives.
        problems: N, one for each completion.
    """

    def __init__(self, scorer: Scorer, problems: Sequence[Problem]) -> None:
        self._scorer, self._problems = scorer, problems
        self._read: dict[int, _Read] = {}
        # By pair: samples of one problem often agree, and those of one prefix always do.
        self._verdicts: dict[Pair, Pending] = {}
        self.calls = AsyncRewards(scorer.objectives, scorer.block_of_objective)

    def add(self, n: int, ids: Sequence[int], ended: bool) -> None:
        """Read completion n and begin to verify it, without waiting. ids: with the end of sequence, if it `ended`."""
        ids = list(ids)
        if n in self._read and self._read[n][:2] == (ids, ended):
            return
        located = locate_blocks(ids[: len(ids) - ended], self._scorer.vocabulary, self._scorer.blocks, ended)
        written = self._written(self._problems[n], len(ids), ended, located)
        self._read[n] = _Read(ids, ended, located, written)
        self.calls.begin(written)
        for answer in _answers(located.spans.sections):
            pair = answer, self._problems[n].reference
            if pair not in self._verdicts:
                with _naming(self._problems[n]):
                    self._verdicts[pair] = self._scorer.verifier.submit([pair])

    def finish(self, samples: SampledTokens) -> Scored:
        """Return the scores, once the verdicts are there. What was not added, or differs from it, is added first."""
        all_ids, lengths = samples.completion_ids.tolist(), samples.completion_mask.sum(1).tolist()
        rows = zip(self._problems, all_ids, lengths, samples.ended.tolist(), strict=True)
        for n, (_, ids, length, ended) in enumerate(rows):
            self.add(n, ids[:length], ended)
        block_of = torch.full(samples.completion_ids.shape, -1)
        # Arrays of NumPy: a row of a tensor, pickled for another rank, would take all rows with it.
        log_probs = None if samples.log_probs is None else samples.log_probs.numpy()
        completions = []
        for n, problem in enumerate(self._problems):
            read = self._read[n]
            block_of[n, : len(read.ids)] = torch.tensor(read.located.block_of[: len(read.ids)])
            with _naming(problem):
                answers = _answers(read.written.sections)
                verdicts = tuple(self._verdicts[answer, problem.reference]()[0] for answer in answers)
            row = None if log_probs is None else log_probs[n, : len(read.ids)]
            block = None if log_probs is None else block_of[n, : len(read.ids)].numpy()
            completions.append(
                Completion(**vars(read.written), verdicts=verdicts, token_log_probs=row, token_block=block)
            )
        numbers = [self._read[n].located.numbers for n in range(len(completions))]
        return self._scorer.reward(completions, block_of, numbers, self.calls)

    def _written(self, problem: Problem, length: int, ended: bool, located: Located) -> WrittenCompletion:
        """Make the record of a completion of `length` tokens, as far as it is known without verdicts."""
        tokens = Counter(located.block_of[:length])
        return WrittenCompletion(
            problem=problem,
            text=located.text,
            sections=located.spans.sections,
            well_formed=located.spans.well_formed,
            confidences=tuple(number.value for number in located.numbers),
            length=length,
            truncated=not ended,
            tokens={block.name: tokens[k] for k, block in enumerate(self._scorer.blocks)},
        )


def _answers(sections: Sequence[Section]) -> list[str]:
    """Return the texts of the answer sections."""
    return [section.content for section in sections if section.tag == ANSWER]


@contextmanager
def _naming(problem: Problem) -> Iterator[None]:
    """Turn what the verifier says of a bad reference into a UserError that names the problem."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"problem {problem.id}: {error}; correct it in the task") from error
