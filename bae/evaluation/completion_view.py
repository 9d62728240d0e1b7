"""Gather what a person sees of a completion: its text block by block, and what each block earned, and why."""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bae.batch import Advantages, Completion, SampledTokens, Scored
from bae.objectives import Objective
from bae.objectives.scoring import Scorer
from bae.text.blocks import ANSWER, Fault
from bae.text.tokens import Located, locate_blocks
from bae.text.verdict import Verdict

KINDS = ("right", "wrong", "malformed")
"""What a completion is, all in all. One with any malformed block is malformed, whatever its answer."""


@dataclass(frozen=True)
class ObjectiveView:
    """Hold what one objective gave a completion.

    Attributes:
        name: of the objective.
        reward: None where it does not count.
        baseline, advantage: None if they are not known.
        given: the objectives whose rewards make the outcome, joined by commas; empty if it conditions on none.
        outcome: of the prefix; None if it conditions on none.
        alike: completions of the prompt with this outcome for which it counts, with this one.
    """

    name: str
    reward: float | None
    baseline: float | None = None
    advantage: float | None = None
    given: str = ""
    outcome: float | None = None
    alike: int = 0


@dataclass(frozen=True)
class BlockView:
    """Hold one block of a completion.

    Attributes:
        name: of the block.
        text: the part that is in form, or all of it.
        broken: the part from where the format broke.
        tokens: of the block; 0 if it was never reached.
        advantage: the weighted sum over its objectives; None if it is not known.
        faults: a clause for each reason why it is malformed.
        objectives: those of the block.
    """

    name: str
    text: str
    broken: str
    tokens: int
    advantage: float | None
    faults: tuple[str, ...]
    objectives: tuple[ObjectiveView, ...]


@dataclass(frozen=True)
class CompletionView:
    """Hold one completion.

    Attributes:
        kind: one of KINDS.
        answers: pairs of an answer and its verdict, in order.
        confidences: the stated numbers; None for one that cannot be read.
        length: number of tokens, with the end of sequence.
        truncated: whether the token limit came before the end of sequence.
        blocks: K.
    """

    kind: str
    answers: tuple[tuple[str, Verdict], ...]
    confidences: tuple[float | None, ...]
    length: int
    truncated: bool
    blocks: tuple[BlockView, ...]


@dataclass(frozen=True)
class Viewer:
    """Make views of the completions of one batch.

    Attributes:
        samples, scored: of N completions.
        scorer: that scored them.
        group_size: completions of each prompt.
        advantages: None if there are none.
        outcomes: (N, J), as in `bae.batch.Advantages`; None if they are not known.
    """

    samples: SampledTokens
    scored: Scored
    scorer: Scorer
    group_size: int
    advantages: Advantages | None = None
    outcomes: Tensor | None = None

    def view(self, n: int) -> CompletionView:
        """Return the view of completion n."""
        completion = self.scored.completions[n]
        answers = [section.content for section in completion.sections if section.tag == ANSWER]
        return CompletionView(
            kind=self.kind(n),
            answers=tuple(zip(answers, completion.verdicts, strict=True)),
            confidences=completion.confidences,
            length=completion.length,
            truncated=completion.truncated,
            blocks=self._blocks(n, completion),
        )

    def kind(self, n: int) -> str:
        """Return the kind of completion n, one of KINDS."""
        completion = self.scored.completions[n]
        if not all(completion.well_formed) or self.scored.malformed[n].any():
            return "malformed"
        return "right" if completion.correct else "wrong"

    def _blocks(self, n: int, completion: Completion) -> tuple[BlockView, ...]:
        """Cut the completion where its tokens change the block, and where the format broke."""
        ids = self.samples.completion_ids[n, : completion.length].tolist()
        written = ids if completion.truncated else ids[:-1]  # without the end of sequence
        located = locate_blocks(written, self.scorer.vocabulary, self.scorer.blocks, not completion.truncated)
        pieces = [self.scorer.vocabulary[i] for i in written]
        raw, offsets = b"".join(pieces), list(accumulate(map(len, pieces), initial=0))
        cuts = [
            offsets[min(bisect_left(located.block_of, k), len(written))] for k in range(len(self.scorer.blocks) + 1)
        ]
        views = []
        for k, block in enumerate(self.scorer.blocks):
            fault = _fault_in(k, located)
            breaks = cuts[k + 1] if fault is None else min(max(fault.start, cuts[k]), cuts[k + 1])
            tokens = completion.tokens.get(block.name, 0)
            views.append(
                BlockView(
                    name=block.name,
                    text=raw[cuts[k] : breaks].decode(errors="replace"),
                    broken=raw[breaks : cuts[k + 1]].decode(errors="replace"),
                    tokens=tokens,
                    advantage=float(self.advantages.per_block[n, k]) if self.advantages and tokens else None,
                    faults=self._faults(n, k, fault) if tokens else (),
                    objectives=tuple(self._objective(n, j) for j in self._objectives_of(k)),
                )
            )
        return tuple(views)

    def _objectives_of(self, k: int) -> list[int]:
        """Return the numbers of the objectives of block k."""
        return [j for j, block in enumerate(self.scorer.block_of_objective) if block == k]

    def _faults(self, n: int, k: int, fault: Fault | None) -> tuple[str, ...]:
        """Return why block k, which was reached, is malformed; nothing if it is not."""
        if fault is not None:
            return (fault.reason,)
        unscored = [self.scorer.objectives[j] for j in self._objectives_of(k) if self.scored.malformed[n, j]]
        return tuple(dict.fromkeys(map(_nothing_to_score, unscored)))

    def _objective(self, n: int, j: int) -> ObjectiveView:
        """Return what objective j gave."""
        objective, counts = self.scorer.objectives[j], bool(self.scored.present[n, j])
        given = ", ".join(objective.givens)
        if not counts:
            return ObjectiveView(objective.name, None, given=given)
        baselines, advantages = (
            (self.advantages.baselines, self.advantages.per_objective) if self.advantages else (None,) * 2
        )
        outcome, alike = self._outcome(n, j) if given else (None, 0)
        return ObjectiveView(
            name=objective.name,
            reward=float(self.scored.rewards[n, j]),
            baseline=None if baselines is None else float(baselines[n, j]),
            advantage=None if advantages is None else float(advantages[n, j]),
            given=given,
            outcome=outcome,
            alike=alike,
        )

    def _outcome(self, n: int, j: int) -> tuple[float | None, int]:
        """Return the outcome for objective j, and how many completions of the group share it."""
        if self.outcomes is None:
            return None, 0
        first = n - n % self.group_size
        group = slice(first, first + self.group_size)
        same = (self.outcomes[group, j] == self.outcomes[n, j]) & self.scored.present[group, j]
        return float(self.outcomes[n, j]), int(torch.count_nonzero(same))


def _fault_in(k: int, located: Located) -> Fault | None:
    """Return where and why the format broke in block k; None if it did not."""
    spans = located.spans
    return spans.fault if spans.fault and spans.well_formed.index(False) == k else None


def _nothing_to_score(objective: Objective) -> str:
    """Return why an objective scores nothing in a block that is in form."""
    if objective.score is not None:
        return "its confidence is no plain number from 0 to 1"
    return f"the reward {objective.name} found nothing to score"
