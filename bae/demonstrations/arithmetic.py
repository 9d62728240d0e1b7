"""Write demonstrations of arithmetic problems, in one format each: those of the policies that ship. Pure text."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from bae.batch import Problem
from bae.demonstrations.pieces import Confidences, Piece
from bae.text.blocks import CONFIDENCE, make_blocks

WORDS = ("short", "long")
"""What an analysis may say: that there are numbers of one digit alone, or longer ones."""


class SolutionConfidence:
    """Write the sections of a format, in order: running totals (`reasoning`), the right answer, a look at the problem
    (`analysis`), and a confidence that knows nothing of it.

    Args:
        blocks: the format, as in `objectives.blocks`. It need not have all of these sections.
        confidences: what may be stated, and how often (weights), whatever the problem.

    Raises:
        ValueError: for a section of another name, and for confidences that cannot be used.
    """

    def __init__(self, blocks: Mapping[str, Any], confidences: Mapping[str, float]) -> None:
        self.tags = [tags for block in make_blocks(blocks) for tags in block.tags]
        self.confidences = Confidences(confidences)
        known = ("reasoning", "answer", "analysis", CONFIDENCE)
        for tags in self.tags:
            if tags.name not in known:
                raise ValueError(
                    f"demonstrations: the format has a section {tags.name!r}, for which nothing is written here; known "
                    f"are {', '.join(known)}"
                )

    def __call__(self, problem: Problem, rng: random.Random) -> list[Piece]:
        terms = read_terms(problem.question)
        contents = {
            "reasoning": _spaced(running_totals(terms)),
            "answer": problem.answer,
            "analysis": WORDS[any(abs(term) > 9 for term in terms)],
            CONFIDENCE: self.confidences.draw(rng),
        }
        return [Piece(f"{tags.opening}{contents[tags.name]}{tags.closing}") for tags in self.tags]


@dataclass(frozen=True)
class TwoAttempts:
    """Write running totals and their answer; then the totals from the last number backwards, and the right answer.

    The first attempt may slip, and goes on from there to a wrong answer. So the second attempt sees what it is there to
    mend. Slips are read, not learnt. When they were learnt, they cost the first attempts of model=tiny_two_attempt more
    than half of their accuracy (.18 instead of .40), and these go wrong often enough by the policy's own lack of skill.

    Args:
        slip: the chance that a total of the first attempt is off, in [0, 1].
        slips: by how much, either way, drawn uniformly; whole numbers above 0.

    Raises:
        ValueError: for options outside these ranges.
    """

    slip: float
    slips: Sequence[int]

    def __post_init__(self) -> None:
        if not 0 <= self.slip <= 1:
            raise ValueError(f"demonstrations.write.slip={self.slip}: must be between 0 and 1")
        if not self.slips or min(self.slips) < 1:
            raise ValueError(f"demonstrations.write.slips={list(self.slips)}: must be one or more numbers above 0")

    def __call__(self, problem: Problem, rng: random.Random) -> list[Piece]:
        terms = read_terms(problem.question)
        errors = [self._error(rng) for _ in terms[1:]]
        totals = running_totals([terms[0], *(term + error for term, error in zip(terms[1:], errors, strict=True))])
        written = [Piece(str(total), learn=not error) for total, error in zip(totals, errors, strict=True)]
        return [
            Piece("<reasoning>"),
            *_joined(written),
            Piece("</reasoning>"),
            _section("answer", str(totals[-1])),
            _section("reasoning", _spaced(running_totals(terms[::-1]))),
            _section("answer", problem.answer),
        ]

    def _error(self, rng: random.Random) -> int:
        return rng.choice(self.slips) * rng.choice((1, -1)) if rng.random() < self.slip else 0


def read_terms(question: str) -> list[int]:
    """Return the signed numbers of an expression: `37+8-152=` -> [37, 8, -152]."""
    return [int(term) for term in question.rstrip("=").replace("-", "+-").lstrip("+").split("+")]


def running_totals(terms: Sequence[int]) -> list[int]:
    """Return the sums of the first two terms, the first three, and so on."""
    return list(accumulate(terms))[1:]


def _spaced(totals: Sequence[int]) -> str:
    return " ".join(map(str, totals))


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with a space between each two."""
    return [part for piece in pieces for part in (Piece(" "), piece)][1:]


def _section(tag: str, content: str) -> Piece:
    return Piece(f"<{tag}>{content}</{tag}>")
