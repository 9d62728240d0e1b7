"""Tasks: where problems come from and how answers are checked. One small file each."""

from typing import Protocol

from bae.batch import Problem
from bae.text.verifier import Verifier


class Task(Protocol):
    """Problems by split and index. `problem` is a pure function, so that data order never depends on history.

    verifier: checks answers of this task.
    """

    verifier: Verifier

    def size(self, split: str) -> int:
        """How many problems the split has. Raises ValueError for an unknown split."""
        ...

    def problem(self, split: str, index: int) -> Problem:
        """Problem number `index`, 0 <= index < size(split)."""
        ...
