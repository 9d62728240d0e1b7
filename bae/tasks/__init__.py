"""Define what a task is: it gives problems, and checks answers. Each task is one small file.

This room imports the rooms up to `bae.objectives`. Start with arithmetic.py, which needs no data; dataset.py reads
questions with reference answers, reasoning_gym.py generates puzzles, and loader.py decides which problems each step
trains on.
"""

from typing import Protocol

from bae.batch import Problem
from bae.text.verifier import Verifier


class Task(Protocol):
    """Give problems by split and index. `problem` is a pure function, so the order of data never depends on history.

    verifier: checks the answers of this task.
    """

    verifier: Verifier

    def size(self, split: str) -> int:
        """Return the number of problems in a split. Raises ValueError for an unknown split."""
        ...

    def problem(self, split: str, index: int) -> Problem:
        """Return problem number `index` of a split, 0 <= index < size(split)."""
        ...
