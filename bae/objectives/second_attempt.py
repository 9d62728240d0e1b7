"""The reward of a second attempt (paper, task 2)."""

from bae.batch import Completion


def second_attempt(completion: Completion, changed: float) -> float | None:
    """Return 1 if the second answer is right, `changed` if it is wrong but differs from the first one, and else 0.

    The verifier tells whether two answers differ. Without a second answer it is None.
    """
    if len(completion.verdicts) < 2:
        return None
    if completion.is_correct(1):
        return 1.0
    return 0.0 if completion.repeats[1] else changed
