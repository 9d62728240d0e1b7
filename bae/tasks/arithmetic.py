"""Sums and differences of graded difficulty, generated: `37+8-152=`. Needs no data and checks answers exactly."""

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bae.batch import Problem
from bae.text.verifier import IntegerVerifier, Verifier

HELD_OUT_OF_TEN = 2
"""Expressions whose checksum modulo 10 is below this belong to the evaluation splits, the others to training."""


@dataclass(frozen=True)
class Difficulty:
    """What the problems of a split are drawn from, uniformly.

    terms: how many numbers are added up. digits: how many digits each number has (at most).
    size: problems in the split. held_out: whether it takes the expressions kept from training.
    """

    terms: tuple[int, ...]
    digits: tuple[int, ...]
    size: int
    held_out: bool


class Arithmetic:
    """Problem `index` of a split is drawn by a generator seeded with (split, index); no expression is in both the
    training and an evaluation split, whatever their sizes."""

    def __init__(self, splits: Mapping[str, Mapping]):
        self.splits = {
            name: Difficulty(_ints(s["terms"]), _ints(s["digits"]), int(s["size"]), bool(s["held_out"]))
            for name, s in splits.items()
        }
        self.verifier: Verifier = IntegerVerifier()

    def size(self, split: str) -> int:
        return self._difficulty(split).size

    def problem(self, split: str, index: int) -> Problem:
        difficulty = self._difficulty(split)
        rng = random.Random(f"{split}/{index}")  # seeds by SHA-512, the same on every machine
        while True:
            numbers = draw(rng, difficulty)
            question = "".join(f"{n:+d}" for n in numbers).removeprefix("+") + "="
            if (zlib.crc32(question.encode()) % 10 < HELD_OUT_OF_TEN) == difficulty.held_out:
                return Problem(f"{split}/{index}", question, str(sum(numbers)))

    def _difficulty(self, split: str) -> Difficulty:
        if split not in self.splits:
            raise ValueError(f"task arithmetic has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]


def draw(rng: random.Random, difficulty: Difficulty) -> list[int]:
    """The signed numbers of one expression; the first is positive."""
    digits = rng.choice(difficulty.digits)
    numbers = [rng.randrange(1, 10**digits) for _ in range(rng.choice(difficulty.terms))]
    return numbers[:1] + [n * rng.choice((1, -1)) for n in numbers[1:]]


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
