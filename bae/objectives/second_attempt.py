"""The reward of a second attempt (paper, task 2)."""

from bae.batch import Completion


def second_attempt(completion: Completion, changed: float) -> float | None:
    """1 if the second answer is right; `changed` if it is wrong and, by the verifier, not the first one again; else 0.

    None without a second answer.
    """
    if len(completion.verdicts) < 2:
        return None
    if completion.is_correct(1):
        return 1.0
    return 0.0 if completion.repeats[1] else changed
