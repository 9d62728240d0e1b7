"""Leave out problems whose prompts are too long."""

import warnings
from array import array
from collections.abc import Callable, Sequence

from tqdm import tqdm

from bae.batch import Problem
from bae.tasks import Task
from bae.text.verifier import Verifier


class ShortPrompts:
    """Give the problems of a task whose prompts have no more than so many tokens, in the order of the task.

    The prompts of a split are counted once, when it is first asked for. A warning says how many are left out.

    Args:
        task: has all problems.
        length: gives the number of tokens of a problem's prompt.
        most: tokens that a prompt may have.
    """

    def __init__(self, task: Task, length: Callable[[Problem], int], most: int) -> None:
        self.task = task
        self.length = length
        self.most = most
        self.verifier: Verifier = task.verifier
        self._kept: dict[str, Sequence[int]] = {}

    def size(self, split: str) -> int:
        """Return the number of problems that are left in a split. Raises ValueError if none is; or as the task does."""
        return len(self._indices(split))

    def problem(self, split: str, index: int) -> Problem:
        """Return problem number `index` of those that are left. Raises as `size` does."""
        return self.task.problem(split, self._indices(split)[index])

    def _indices(self, split: str) -> Sequence[int]:
        """Return the indices in the task of the problems that are left, and count their tokens the first time."""
        if split not in self._kept:
            size = self.task.size(split)
            numbers = tqdm(range(size), desc=f"counting the tokens of {split}", unit="prompt", delay=5, leave=False)
            kept = array("Q", (i for i in numbers if self.length(self.task.problem(split, i)) <= self.most))
            if not kept:
                raise ValueError(f"max_prompt_tokens={self.most}: no prompt of {split} is that short; raise it")
            if len(kept) < size:
                warnings.warn(
                    f"max_prompt_tokens={self.most}: {size - len(kept)} of the {size} problems of {split} are left "
                    "out, because their prompts are longer",
                    stacklevel=2,
                )
            self._kept[split] = kept
        return self._kept[split]
