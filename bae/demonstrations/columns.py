"""Write demonstrations from the columns of a data set: a worked solution, an answer, and a confidence from nowhere."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bae.batch import Problem
from bae.demonstrations.pieces import Confidences, Piece
from bae.text.blocks import CONFIDENCE, make_blocks

Analyse = Callable[[str], str]
"""Write the content of an `analysis` section about a worked solution."""

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class FromColumns:
    """Write the sections of the format, in order: what each is called decides what it holds.

    `reasoning` is the worked solution, `answer` the reference answer, `analysis` what `analyse` says of the solution,
    and `confidence` a draw. A section of any other name is the column of that name.

    Args:
        blocks: the format, as in `objectives.blocks`.
        reasoning: the column of the worked solution. A problem without one is left out.
        before: the solution is the part of the column before the last place of this text. None takes the whole column.
        remove: what this regular expression matches is removed from the solution. None removes nothing.
        analyse: makes the analysis of the solution.
        confidences: see `Confidences`.

    Raises:
        ValueError: for a regular expression or confidences that cannot be used.
    """

    def __init__(
        self,
        blocks: Mapping[str, Any],
        reasoning: str,
        analyse: Analyse,
        confidences: Mapping[str, float],
        before: str | None = None,
        remove: str | None = None,
    ) -> None:
        self.tags = [tags for block in make_blocks(blocks) for tags in block.tags]
        self.reasoning = reasoning
        self.analyse = analyse
        self.confidences = Confidences(confidences)
        self.before = before
        try:
            self.remove = re.compile(remove) if remove else None
        except re.error as error:
            raise ValueError(f"demonstrations.write.remove={remove}: not a regular expression ({error})") from error

    def __call__(self, problem: Problem, rng: random.Random) -> Sequence[Piece] | None:
        """Write one completion; None for a problem without a worked solution. Raises ValueError if a column lacks."""
        solution = self._solution(problem)
        if solution is None:
            return None
        known = {"reasoning": solution, "answer": problem.answer, "analysis": self.analyse(solution)}
        pieces = []
        for tags in self.tags:
            content = self.confidences.draw(rng) if tags.name == CONFIDENCE else known.get(tags.name)
            content = self._column(problem, tags.name) if content is None else content
            pieces.append(Piece(f"{tags.opening}{content}{tags.closing}"))
        return pieces

    def _solution(self, problem: Problem) -> str | None:
        """Return the worked solution, or None if there is none."""
        text = self._column(problem, self.reasoning)
        if not isinstance(text, str):
            return None
        if self.before is not None:
            text = text.rpartition(self.before)[0]
        if self.remove:
            text = self.remove.sub("", text)
        return text.strip() or None

    def _column(self, problem: Problem, name: str) -> Any:
        """Return a cell of the problem's row. Raises ValueError if there is no such column."""
        if name not in problem.columns:
            has = ", ".join(map(str, problem.columns)) or "none"
            raise ValueError(f"demonstrations: problem {problem.id} has no column {name!r}; its columns: {has}")
        return problem.columns[name]


def steps_and_size(solution: str) -> str:
    """Say how many steps a solution has, and how large its numbers are: "Two steps, with numbers up to 17.".

    A step is an equals sign.
    """
    steps, numbers = solution.count("="), re.findall(r"\d+(?:\.\d+)?", solution.replace(",", ""))
    count = NUMBERS[steps] if steps < len(NUMBERS) else str(steps)
    text = f"{count.capitalize()} step{'s' * (steps != 1)}"
    return f"{text}, with numbers up to {max(numbers, key=float)}." if numbers else f"{text}, without numbers."
