"""Generate sums and differences of graded difficulty: `37+8-152=`. Needs no data, and checks answers exactly."""

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bae.batch import Problem
from bae.text.verifier import IntegerVerifier, Verifier

HELD_OUT_OF_TEN = 2
"""Expressions whose checksum modulo 10 is below this belong to the evaluation splits, all others to training."""


@dataclass(frozen=True)
class Difficulty:
    """Hold the choices from which the problems of a split are drawn, uniformly.

    Args:
        terms: how many numbers a problem may have.
        digits: how many digits the numbers of a problem may have, at most.
        size: the number of problems in the split.
        held_out: whether the split takes the expressions that are kept from training.
    """

    terms: tuple[int, ...]
    digits: tuple[int, ...]
    size: int
    held_out: bool


class Arithmetic:
    """Generate arithmetic problems. Each problem is drawn by a generator seeded with (split, index).

    No expression is in both the training split and an evaluation split, whatever their sizes.

    Args:
        splits: {split: the fields of Difficulty}.
    """

    def __init__(self, splits: Mapping[str, Mapping[str, Any]]) -> None:
        self.splits = {
            name: Difficulty(_ints(s["terms"]), _ints(s["digits"]), int(s["size"]), bool(s["held_out"]))
            for name, s in splits.items()
        }
        self.verifier: Verifier = IntegerVerifier()

    def size(self, split: str) -> int:
        """Return the number of problems in a split. Raises ValueError for an unknown split."""
        return self._difficulty(split).size

    def problem(self, split: str, index: int) -> Problem:
        """Return problem number `index` of a split. Raises ValueError for an unknown split."""
        difficulty = self._difficulty(split)
        rng = random.Random(f"{split}/{index}")  # a text seeds it by SHA-512, which is the same on every machine
        while True:
            numbers = draw(rng, difficulty)
            question = "".join(f"{n:+d}" for n in numbers).removeprefix("+") + "="
            if is_held_out(question) == difficulty.held_out:
                return Problem(f"{split}/{index}", question, str(sum(numbers)))

    def _difficulty(self, split: str) -> Difficulty:
        """Return the difficulty of a split. Raises ValueError for an unknown split."""
        if split not in self.splits:
            raise ValueError(f"task arithmetic has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]


def is_held_out(question: str) -> bool:
    """Tell whether a generated question belongs to the evaluation splits, on every machine alike."""
    return zlib.crc32(question.encode()) % 10 < HELD_OUT_OF_TEN


def draw(rng: random.Random, difficulty: Difficulty) -> list[int]:
    """Draw the signed numbers of one expression; the first one is positive."""
    digits = rng.choice(difficulty.digits)
    numbers = [rng.randrange(1, 10**digits) for _ in range(rng.choice(difficulty.terms))]
    return numbers[:1] + [n * rng.choice((1, -1)) for n in numbers[1:]]


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    """Make a tuple of ints."""
    return tuple(int(v) for v in values)
